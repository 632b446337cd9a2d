"""The causes of a failed room, a closed set. People read the sentence of a failure; metrics count its cause.

The cause travels with the failure, so both sides count the same one. A value that is not listed is a protocol error.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from .settings import Wait


class Cause(Enum):
    """The cause of a failure.

    Values are labels of metrics and travel in messages: a new cause is a new member, never a new meaning of an old one.
    """

    ABORTED = "aborted"
    """An engine aborted the request."""
    CLEARED = "cleared"
    """An engine cleared the room before it ended."""
    CLOSED = "closed"
    """A manager was closed."""
    BOOTSTRAP = "bootstrap_timeout"
    """The other side did not open the room."""
    WAITING = "waiting_timeout"
    """No pages were offered, no first bytes came, or the prefill engine sent no further chunk."""
    STALL = "stall_timeout"
    """Bytes were moving and stopped, or a checksum did not come."""
    DRAIN = "drain_timeout"
    """A sink revoked its grant and did not send the cause."""
    UNREACHABLE = "unreachable"
    """The sources could not be found or linked."""
    NOT_ALLOWED = "address_not_allowed"
    """A client named a directory that the allow-list does not have."""
    LINK_LOST = "link_lost"
    """The connection to a peer closed, or the peer was silent or fenced."""
    TRANSFER = "transfer_broke"
    """The transport could not move the blocks."""
    CHECKSUM = "checksum"
    """The bytes of the two sides differ."""
    IDENTITY = "identity_mismatch"
    """The two sides were given different requests."""
    LENGTH = "length_mismatch"
    """The two sides count different tokens or bytes."""
    INCOMPATIBLE = "incompatible"
    """The two layouts or transports do not fit together."""
    IN_USE = "room_in_use"
    """The number belongs to a room that is open."""
    LIMIT = "limit"
    """A limit of `Limits` is reached."""
    MISUSE = "misuse"
    """An engine made a call that the room does not allow."""
    INTERNAL = "internal"
    """A bug in kvroom."""


TIMED_OUT: Mapping[Wait, Cause] = {
    Wait.BOOTSTRAP: Cause.BOOTSTRAP,
    Wait.WAITING: Cause.WAITING,
    Wait.STALL: Cause.STALL,
    Wait.DRAIN: Cause.DRAIN,
}
"""The cause of a room that failed because one of its waits timed out."""

"""Why a room can fail, as a closed set. The sentence of a failure is for people; its cause here is what is counted.

It travels with the failure, so that both sides count the same one. A value that is not listed is a protocol error.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from .settings import Wait


class Cause(Enum):
    """The values are labels of metrics and go over the wire: a new cause is a new member, never a new meaning."""

    ABORTED = "aborted"  # an engine gave the request up
    CLEARED = "cleared"  # an engine let it go before its end
    CLOSED = "closed"  # a manager was closed
    BOOTSTRAP = "bootstrap_timeout"  # the other side did not come to the room
    WAITING = "waiting_timeout"  # no first bytes, or no further chunk
    STALL = "stall_timeout"  # no more bytes
    DRAIN = "drain_timeout"  # a sink that took its grant back did not say why
    UNREACHABLE = "unreachable"  # the sources could not be found or linked
    NOT_ALLOWED = "address_not_allowed"  # a client named a directory that this side may not ask
    LINK_LOST = "link_lost"  # a peer ended, fell silent or was cut off
    TRANSFER = "transfer_broke"  # the transport could not move the blocks
    CHECKSUM = "checksum"  # the bytes here are not the bytes there
    IDENTITY = "identity_mismatch"  # the two sides were given different requests
    LENGTH = "length_mismatch"  # the two sides differ in tokens or bytes
    INCOMPATIBLE = "incompatible"  # the two memories, or their transports, do not fit together
    IN_USE = "room_in_use"  # the number belongs to a room that is open
    LIMIT = "limit"  # something stated is full
    MISUSE = "misuse"  # an engine asked for what the phase does not allow
    INTERNAL = "internal"  # a fault of ours


TIMED_OUT: Mapping[Wait, Cause] = {
    Wait.BOOTSTRAP: Cause.BOOTSTRAP,
    Wait.WAITING: Cause.WAITING,
    Wait.STALL: Cause.STALL,
    Wait.DRAIN: Cause.DRAIN,
}
"""The cause of a room that failed because one of its waits timed out."""

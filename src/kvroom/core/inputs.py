"""The inputs of a room, as frozen values: calls of the engine, ends of transfers, changes of links, proofs.

The driver feeds them to the room's state machine, which is the only code that acts on them. Messages from peers and
deadlines come in through `Room.receive` and `Room.expire`.
"""

from __future__ import annotations

import msgspec

from .causes import Cause
from .identity import KVIdentity
from .messages import Offered, PartNumbers, Peer, Text, Window


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one source in a sink's room: see `messages.Offer` for `sinks` and `parts`.

    The sources of one `team` split the request's tokens among themselves and report their own (`Done.spans`). A source
    without a team has all tokens.
    """

    sinks: int = 1
    parts: tuple[PartNumbers, ...] | None = None
    team: int | None = None


class Identify(msgspec.Struct, frozen=True, kw_only=True):
    """Either side, from the engine: the identity of the request. It must come before pages are offered or sent."""

    identity: KVIdentity


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """Sink: the links to all its sources are up. `shares` has one entry for each source; empty: all are `Share()`."""

    sources: tuple[Peer, ...]
    shares: tuple[Share, ...] = ()


class OfferPages(Offered, frozen=True, kw_only=True):
    """Sink, from the engine: these pages may be written. All sources together must report `nbytes` bytes."""

    nbytes: int


class SendPages(msgspec.Struct, frozen=True, kw_only=True):
    """Source, from the engine: the KV of tokens [start, stop) is computed and lies in these pages.

    `pages[0]` is the page that holds token `start`; if `start` is None, the previous stop counts. No chunk may follow
    the one that is `last`: its `stop` is the request's length, and it has the pages of further groups (`windows`).
    """

    pages: tuple[int, ...]
    stop: int
    last: bool = False
    aux: bytes = b""
    start: int | None = None
    windows: tuple[Window, ...] = ()


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """Either side, from the engine or the driver: end the room for this cause."""

    cause: Cause = Cause.ABORTED
    detail: str


class Clear(msgspec.Struct, frozen=True):
    """Either side, from the engine: the room fails unless it has ended, and is removed when it is drained."""


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """Source: every byte of this transfer has landed. `transport` is the name of the transport that moved it."""

    transfer: int
    nbytes: int
    transport: Text = ""


class Broke(msgspec.Struct, frozen=True, kw_only=True):
    """Source: this transfer ended without success. It no longer reads or writes.

    `revoked`: the sink refused it because it had revoked its grant. The sink then gave up, and its `Abort` will follow.
    """

    transfer: int
    detail: str
    revoked: bool = False
    cause: Cause = Cause.TRANSFER


class Checksummed(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the checksum over the bytes for this peer (None: the only one) is computed."""

    value: int
    peer: Peer | None = None


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """Sink: its checksums were compared with the sources'. `error` names two values that differ; None: all agree."""

    error: str | None


class PeerUp(msgspec.Struct, frozen=True, kw_only=True):
    """The link to this peer, the same incarnation as before, is up again."""

    peer: Peer


class PeerLost(msgspec.Struct, frozen=True, kw_only=True):
    """The link to this peer is lost. That does not prove that the peer has stopped writing."""

    peer: Peer
    detail: str


class Fenced(msgspec.Struct, frozen=True, kw_only=True):
    """Proof: this peer can no longer write into the memory of this process."""

    peer: Peer


class Revoked(msgspec.Struct, frozen=True):
    """Proof: nothing lands under this room's grant from now on."""


Input = (
    Identify
    | Resolved
    | OfferPages
    | SendPages
    | GiveUp
    | Clear
    | Landed
    | Broke
    | Checksummed
    | Verified
    | PeerUp
    | PeerLost
    | Fenced
    | Revoked
)

"""Everything that can happen to a room, as frozen values: what the engine asked, a peer said, a transfer or timer did.

Engine threads post these; the driver feeds them to the room's machine, which is the only code that acts on them.
"""

from __future__ import annotations

import msgspec

from .causes import Cause
from .identity import KVIdentity
from .messages import Offered, PartNumbers, Peer, Text, Window


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one source has to do with a sink: see `messages.Offer` for `sinks` and `parts`.

    Sources of one `team` split the request's tokens among themselves, as they say with each send; one without a team
    has all of them.
    """

    sinks: int = 1
    parts: tuple[PartNumbers, ...] | None = None
    team: int | None = None


class Identify(msgspec.Struct, frozen=True, kw_only=True):
    """Either side, from the engine: the identity of the request, before pages are offered or sent."""

    identity: KVIdentity


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """Sink: the links to all of its sources are up. `shares`: one for each source, or none if all are plain."""

    sources: tuple[Peer, ...]
    shares: tuple[Share, ...] = ()


class OfferPages(Offered, frozen=True, kw_only=True):
    """Sink, from the engine: these pages may be written. `nbytes` is what all sources together must report."""

    nbytes: int


class SendPages(msgspec.Struct, frozen=True, kw_only=True):
    """Source, from the engine: the KV of tokens [start, stop) is computed and lies in these pages.

    `pages[0]` is the page that holds token `start`; None: the previous stop. Nothing may follow the chunk that is
    `last`; its `stop` is the request's length, and it brings the `windows` of further groups.
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
    """Either side, from the engine: it has no more interest. The room is gone as soon as nobody can touch its pages."""


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """Source: every byte of this transfer has landed. `transport`: by what it was moved, in words."""

    transfer: int
    nbytes: int
    transport: Text = ""


class Broke(msgspec.Struct, frozen=True, kw_only=True):
    """Source: this transfer ended without success. It reads and writes nothing any more.

    `revoked`: because the sink has ended its grant. Then the sink has given up, and its `Abort`, under way, says why.
    """

    transfer: int
    detail: str
    revoked: bool = False
    cause: Cause = Cause.TRANSFER


class Checksummed(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the checksum over what it was to write to this peer (None: to its only one)."""

    value: int
    peer: Peer | None = None


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """Sink: its checksums were compared with the sources'. `fault` names the values that differ; None: all agree."""

    error: str | None


class PeerUp(msgspec.Struct, frozen=True, kw_only=True):
    """The link to this peer, the same incarnation as before, is up again."""

    peer: Peer


class PeerLost(msgspec.Struct, frozen=True, kw_only=True):
    """The link to this peer is gone. That is no proof that it has stopped writing."""

    peer: Peer
    detail: str


class Fenced(msgspec.Struct, frozen=True, kw_only=True):
    """Proof: this peer can write nothing into our memory any more."""

    peer: Peer


class Revoked(msgspec.Struct, frozen=True):
    """Proof: nothing lands under this room's grant any more."""


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

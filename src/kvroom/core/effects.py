"""What a room wants done, as frozen values. A machine returns them; only the driver carries them out."""

from __future__ import annotations

import msgspec

from .inputs import SendPages, Share
from .messages import Message, Offer, Offered, Peer, Window


class Send(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a peer. If its link is down the message is dropped: the deadlines cover it.

    `again`: it was said before and will be said again. It is dropped also while much else waits for this peer, or all
    rooms of a peer that was linked again could ask at once for more than its link may hold.
    """

    peer: Peer
    message: Message
    again: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """Copy tokens [start, stop) from our `pages` (which begin at token `pages_start`) into the offer's pages.

    `windows`: besides, from our pages of these groups into the offer's.
    """

    transfer: int
    offer: Offer
    peer: Peer
    pages: tuple[int, ...]
    pages_start: int
    start: int
    stop: int
    windows: tuple[Window, ...] = ()


class Checksum(msgspec.Struct, frozen=True, kw_only=True):
    """Source: compute the checksum of the offer's window over the pages of these chunks; answer `Checksummed`.

    `spans`: only of these tokens, as in `Done.spans`.
    """

    offer: Offer
    peer: Peer
    chunks: tuple[SendPages, ...]
    spans: tuple[tuple[int, int], ...] = ()


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What one source has reported: the checksum over its bytes, its tokens and groups (see `Done`)."""

    peer: Peer
    checksum: int
    spans: tuple[tuple[int, int], ...] = ()
    windows: tuple[str, ...] | None = None


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """Sink: compute each source's checksum over the offered pages and compare it; answer `Verified`."""

    offer: Offered
    claims: tuple[Claim, ...]
    shares: tuple[Share, ...]


class Revoke(msgspec.Struct, frozen=True):
    """End the transport's leave to write. If that proves that nothing lands any more, answer `Revoked`."""

    grant: bytes


class Fence(msgspec.Struct, frozen=True):
    """Ask the transport to break with this peer. If that proves that it writes no more, answer `Fenced`."""

    peer: Peer


class ReleasePages(msgspec.Struct, frozen=True):
    """These pages are the engine's again: nobody reads or writes them for this room. Once for each room."""

    pages: tuple[int, ...]


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """These pages stay held: the drain could not be proven in time. `again`: nor in the times before."""

    pages: tuple[int, ...]
    again: bool = False


class Report(msgspec.Struct, frozen=True):
    """Something that the engine can see has changed: phase, failure, prefix length. Read it from the room."""


Effect = Send | Submit | Checksum | Verify | Revoke | Fence | ReleasePages | Quarantine | Report

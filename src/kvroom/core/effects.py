"""The effects of a room, as frozen values. A state machine returns them, and only the driver carries them out."""

from __future__ import annotations

import msgspec

from .inputs import SendPages, Share
from .messages import Message, Offer, Offered, Peer, Window


class Send(msgspec.Struct, frozen=True, kw_only=True):
    """Send a message to a peer. If its link is down the message is dropped: the deadlines of the room cover this.

    `again`: the message was sent before and will be repeated. It is dropped also while the queue to this peer is long.
    Otherwise all rooms of a peer that was linked again could together overfill the queue of its link.
    """

    peer: Peer
    message: Message
    again: bool = False


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    """Copy tokens [start, stop) from this side's `pages`, which begin at token `pages_start`, into the offer's pages.

    Answer `Landed` or `Broke` with the number `transfer`. `windows` are this side's pages of further groups, to be
    copied into the offer's pages of the same groups.
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

    `spans` limits it to these tokens, as in `Done.spans`.
    """

    offer: Offer
    peer: Peer
    chunks: tuple[SendPages, ...]
    spans: tuple[tuple[int, int], ...] = ()


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The report of one source: the checksum over its bytes, its tokens and its groups (see `Done`)."""

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
    """End a grant of the transport. If that proves that nothing lands under it from now on, answer `Revoked`."""

    grant: bytes


class Fence(msgspec.Struct, frozen=True):
    """Ask the transport to cut this peer off. If that proves that the peer can no longer write, answer `Fenced`."""

    peer: Peer


class ReleasePages(msgspec.Struct, frozen=True):
    """Return these pages to the engine: nothing reads or writes them for this room. Happens once for each room."""

    pages: tuple[int, ...]


class Quarantine(msgspec.Struct, frozen=True, kw_only=True):
    """Report that these pages stay held because the drain is overdue. `again`: this was reported before."""

    pages: tuple[int, ...]
    again: bool = False


class Report(msgspec.Struct, frozen=True):
    """Publish the room's state to its handle: the phase, the failure or the prefix length has changed."""


Effect = Send | Submit | Checksum | Verify | Revoke | Fence | ReleasePages | Quarantine | Report

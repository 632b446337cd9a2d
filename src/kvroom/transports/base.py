"""The transport interface: moves blocks between two processes. It knows blocks and peers; it does not know rooms.

What every transport promises, and `kvroom.conformance` checks:

- `submit` never blocks and never raises for a fault of the peer: the future it returns carries the `TransportError`.
- A future that is done is final: its transfer reads no local byte and writes no remote byte any more.
- A transfer that failed leaves the peer usable: the next good one succeeds, or `connect` makes it so.
- Bytes land only inside memory that the receiving side registered. Where the sink does the writing, they land only
  inside a grant, and only if they come from a peer that the grant is bound to (`bind`).

A peer chose every byte of a description and of a grant. A declared `TransportError` says that blocks cannot travel, and
the link stays for its words. Whatever else those bytes make a transport raise, `MalformedDescription` or an exception
that nobody thought of, is that peer's fault: the driver ends its link with the error's text, and no other room or link
is touched. So a transport checks what it needs for its own safety, and has no `except` for odd numbers and texts; what
it took before it raised (descriptors, handles of other transports) it has to give back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvroom.errors import RemoteProtocolError, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.wire.keys import SigningKey

from .kit.batches import normal
from .kit.options import TransportOptions
from .kit.ranges import Ranges
from .kit.transfers import Transfer, failed, finished

DESCRIPTION_BYTES = 64 << 10
"""How long a description may be."""


class MalformedDescription(RemoteProtocolError, TransportError):
    """A peer's description cannot be read, or names what cannot be. The link that carried it must be closed."""


class OutOfReach(TransportError):
    """Neither end can ever write to the other by this transport: another machine, another kind of network."""


class Transport(ABC):
    """One instance per manager. All methods may be called from any thread."""

    name: ClassVar[str]
    options: ClassVar[type[TransportOptions]] = TransportOptions
    """What it can be told. One with options of its own is made with such a struct, another with nothing."""

    key: SigningKey
    """The key of this instance, made with it. `describe` states its public part as `endpoint`; see `kit.claims`."""

    _memory: Ranges = Ranges.of(())
    """All that this side registered; `register` sets it."""

    @abstractmethod
    def register(self, memory: Sequence[MemoryRange]) -> None:
        """Make memory readable by our own transfers and writable by granted peers. Once, before `describe`."""

    @abstractmethod
    def describe(self) -> bytes:
        """Return what a peer needs in order to `connect` here, at most 64 KiB: a map whose `endpoint` is `key.public`.

        It travels over an authenticated link, signed with `key`; `connect` is given only what was signed for that peer.
        """

    @abstractmethod
    def connect(self, description: bytes) -> int:
        """Return a handle for the peer that described itself so. May block for seconds; raises `TransportError`.

        Both sides connect: the source in order to write, the sink, before it grants, in order to `fence` a writer.
        An endpoint that has a handle gets the same one again.
        """

    def watch(self, description: bytes) -> int:
        """Return a handle good for `fence` alone: we cannot write to that peer, but it may be able to write here."""
        return self.connect(description)

    def grant(self, extents: Extents) -> bytes:  # noqa: ARG002 - the default enforces nothing
        """Leave to write into these extents, for the peers it is bound to; the token travels in the offer.

        Transports whose sink does the writing enforce it. One-sided ones cannot, and return `b""`.
        """
        return b""

    def bind(self, grant: bytes, peer: int) -> None:  # noqa: B027 - the default enforces nothing
        """Let this peer use the grant, besides those before it; called before it is sent the token.

        Transports whose sink does the writing refuse a write of every other peer under this grant, with words on both
        sides. One-sided writes cannot be bound: the source's engine makes them, the sink takes no part, and a peer
        that can reach memory for one request can reach it for every request. A grant that was revoked meanwhile and a
        peer that was fenced are no errors: nothing is bound then.
        """

    def revoke(self, grant: bytes) -> bool:  # noqa: ARG002
        """End a grant. True: proven, not one byte lands under it any more. False: only the writer itself can say so."""
        return False

    def explain(self, peer: int) -> str:  # noqa: ARG002
        """One sentence for people: how bytes reach this peer and why that way."""
        return self.name

    def transport_for(self, peer: int) -> str:  # noqa: ARG002
        """The name of the transport that moves blocks to this peer: this one's, if it does not choose among others."""
        return self.name

    def warning(self) -> str:
        """One sentence that people must hear who use this transport, known after `register`; "" if there is none."""
        return ""

    def staging_slots(self) -> dict[str, int]:
        """What is kept of transfers under way that is not of the engine's pools; nothing but zeros when all is idle."""
        return {}

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Write our `blocks.src` to the peer's `blocks.dst`. No blocks: done at once with 0.

        Blocks outside of the memory that the two sides registered fail the transfer, and nothing of it is written.
        """
        try:
            blocks = normal(blocks)
            self._memory.check("source", blocks.src, blocks.length, "this side registered")
            theirs = self._peer_memory(peer)
            if theirs is not None:
                theirs.check("destination", blocks.dst, blocks.length, "the peer registered")
            return self._move(peer, blocks, grant) if blocks.length.size else finished(0)
        except TransportError as error:
            return failed(error)

    def _peer_memory(self, peer: int) -> Ranges | None:  # noqa: ARG002 - the default knows nothing of peers
        """Return what the peer registered; None if its own side looks at each write.

        Raise `TransportError` if there is no such peer, or if it was fenced.
        """
        return None

    @abstractmethod
    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Begin to write at least one block; `submit` has checked them. Never block; raise `TransportError` to refuse.

        Another thread may have fenced the peer, or closed this transport, since the blocks were checked.
        """

    @abstractmethod
    def fence(self, peer: int) -> bool:
        """Break with a peer: fail what is queued for it, wait for what is under way (bounded), drop the connection.

        True: besides, it is proven that the peer cannot write into our memory any more; the handle is then forgotten.
        False: not provable now; may be asked again. May block for a second.
        """

    def note_lost(self, peer: int, host: str, others: frozenset[str]) -> None:  # noqa: B027 - most need nothing
        """Take note of what connects us with a peer whose link was lost, while it can be told from what comes later.

        `host` is the numeric address at the other end of that link, `others` are those of the peers that are linked
        now. May be called again, and may block for a moment; the default keeps nothing.
        """

    def fence_dead(self, peer: int) -> bool:
        """Like `fence`, for a peer whose process has ended, as others have proven: only its last bytes may still come.

        Where this side can see for itself that the process runs, it is not believed to have ended.
        """
        return self.fence(peer)

    @abstractmethod
    def close(self) -> None:
        """Fence everybody, unregister, free. Idempotent. Every transfer's future is done afterwards."""

"""The transport interface, which moves blocks between two processes. It knows blocks and peers; it does not know rooms.

Every transport makes these promises, and `kvroom.conformance` checks them:

- `submit` never blocks, and never raises an error that the peer caused: the future that it returns carries the
  `TransportError`.
- A completed future is final: its transfer reads no further local byte and writes no further remote byte.
- A failed transfer leaves the peer usable: the next valid one succeeds, if necessary after another `connect`.
- Bytes land only inside memory that the receiving side registered. Where the sink does the writing, they land only
  inside a grant, and only if they come from a peer that the grant is bound to (`bind`).

The peer chooses every byte of its description and of its grants. A `TransportError` means that blocks cannot travel;
the link stays up and carries the reason to the peer. Any other exception that those bytes cause, from
`MalformedDescription` to one that the transport's author did not foresee, is the peer's doing: the driver closes that
peer's link with the text of the error and touches no other room or link. A transport therefore checks what its own
safety requires and needs no `except` for malformed numbers and texts. Before an exception leaves it, it must release
whatever it acquired (descriptors, handles of other transports).
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
"""The maximum length of a description, in bytes."""


class MalformedDescription(RemoteProtocolError, TransportError):
    """A peer's description cannot be decoded or contradicts itself. The link that carried it must be closed."""


class OutOfReach(TransportError):
    """This transport can never connect the two ends, because of different machines or different kinds of network."""


class Transport(ABC):
    """Base class of transports. A manager has one instance. All methods may be called from any thread."""

    name: ClassVar[str]
    options: ClassVar[type[TransportOptions]] = TransportOptions
    """The struct of this transport's options. A transport with options is constructed with an instance of the struct,
    one without options (the default) with no argument."""

    key: SigningKey
    """The key pair of this instance. `describe` states the public half as `endpoint`; see `kit.claims`."""

    _memory: Ranges = Ranges.of(())
    """The memory that this side registered; set by `register`."""

    @abstractmethod
    def register(self, memory: Sequence[MemoryRange]) -> None:
        """Make memory readable by this side's transfers and writable by peers. Called once, before `describe`.

        Args:
            memory: The pools of the engine, in host memory or on a device. They must stay mapped until `close`.

        Raises:
            ConfigurationError: This transport cannot use the memory. Nothing is registered then.
        """

    @abstractmethod
    def describe(self) -> bytes:
        """Return what a peer needs in order to `connect` to this side.

        The description travels over an authenticated link, signed with `key`. The receiving manager checks the
        signature before it calls `connect`, so a peer cannot pass on the description of another.

        Returns:
            A msgpack map of at most `DESCRIPTION_BYTES` bytes, whose `endpoint` is `key.public`.
        """

    @abstractmethod
    def connect(self, description: bytes) -> int:
        """Connect to a peer. May block for seconds.

        Both sides connect: the source in order to write, and the sink, before it grants, in order to be able to
        `fence` the writer.

        Args:
            description: What the peer's own `describe` returned.

        Returns:
            The peer's handle. An endpoint that already has a handle gets the same handle again.

        Raises:
            OutOfReach: This transport can never connect the two.
            MalformedDescription: The description is invalid.
            TransportError: The peer cannot be reached now. A later call may succeed.
        """

    def watch(self, description: bytes) -> int:
        """Return a handle that serves only for `fence`, for a peer that may write here but cannot be written to.

        Args, result and errors are those of `connect`.
        """
        return self.connect(description)

    def grant(self, extents: Extents) -> bytes:  # noqa: ARG002 - the default enforces nothing
        """Allow writes into these extents by the peers that `bind` names. Return the token that the offer carries.

        Transports whose sink does the writing enforce a grant. One-sided transports cannot, and return `b""`.
        """
        return b""

    def bind(self, grant: bytes, peer: int) -> None:  # noqa: B027 - the default enforces nothing
        """Allow one more peer to use the grant. Called before the token is sent to that peer.

        Transports whose sink does the writing refuse writes under this grant by any other peer, and log it on both
        sides. One-sided writes cannot be bound: the source's engine makes them without the sink, and a peer that can
        reach the memory for one request can reach it for every request. If the grant has been revoked or the peer
        fenced since, nothing is bound, and that is not an error.
        """

    def revoke(self, grant: bytes) -> bool:  # noqa: ARG002
        """End a grant.

        Returns:
            True if it is proven that no further byte lands under the grant; False if only the writer can state that.
        """
        return False

    def explain(self, peer: int) -> str:  # noqa: ARG002
        """Return one sentence for operators: how bytes reach this peer, and why that way."""
        return self.name

    def transport_for(self, peer: int) -> str:  # noqa: ARG002
        """Return the name of the transport that moves blocks to this peer; only `auto` names another than its own."""
        return self.name

    def warning(self) -> str:
        """Return a one-line warning for the operator, or "" if there is none. Valid after `register`."""
        return ""

    def staging_slots(self) -> dict[str, int]:
        """Return the number of staging slots in use, by state. All are zero when no transfer is in flight."""
        return {}

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Write this side's `blocks.src` to the peer's `blocks.dst`. Never blocks and never raises `TransportError`.

        Args:
            peer: A handle from `connect`.
            blocks: Addresses and lengths in bytes. Each must lie in memory that its side registered; otherwise the
                transfer fails and none of its bytes is written.
            grant: The token from the peer's offer.

        Returns:
            A future with the number of bytes written, or the `TransportError`. Without blocks it is completed with 0.
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

    def _peer_memory(self, peer: int) -> Ranges | None:  # noqa: ARG002 - the default has no peers
        """Return the memory that the peer registered, or None if the peer's side checks each write itself.

        Raise `TransportError` if the handle is unknown or the peer was fenced.
        """
        return None

    @abstractmethod
    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Start writing at least one block, which `submit` has checked. Never block; raise `TransportError` to refuse.

        Another thread may have fenced the peer or closed this transport since that check.
        """

    @abstractmethod
    def fence(self, peer: int) -> bool:
        """Cut a peer off: fail its queued transfers, wait a bounded time for those in flight, drop the connection.

        May block for a second.

        Returns:
            True if it is also proven that the peer can no longer write into this side's memory; the handle is then
            forgotten. False if that cannot be proven now; the caller may try again.
        """

    def note_lost(self, peer: int, host: str, others: frozenset[str]) -> None:  # noqa: B027 - most need nothing
        """Record which connections belong to a peer whose link was lost, before a successor opens similar ones.

        A transport that proves a fence by the state of the kernel's sockets needs this: once the peer has restarted,
        its new connections could not be told from the old ones. May be called again, and may block for a moment. The
        default records nothing.

        Args:
            peer: The handle of the lost peer.
            host: The numeric address at the other end of the lost link.
            others: The numeric addresses of the peers that are linked now.
        """

    def fence_dead(self, peer: int) -> bool:
        """Fence a peer whose process has ended, as others have proven. Only bytes already sent can still arrive.

        A transport that can see that the process is running returns False. The result is that of `fence`.
        """
        return self.fence(peer)

    @abstractmethod
    def close(self) -> None:
        """Fence all peers, unregister the memory and release resources. Idempotent.

        Afterwards the future of every transfer is completed.
        """

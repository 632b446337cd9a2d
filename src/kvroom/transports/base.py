"""The transport interface, which moves blocks between two processes. It knows blocks and peers; it does not know rooms.

Every transport makes these promises, and `kvroom.conformance` checks them:

- `submit` never blocks, and never raises an error that the peer caused: the future that it returns carries the
  `TransportError`.
- A completed future is final: its transfer reads no further local byte and writes no further remote byte.
- A failed transfer leaves the peer usable: the next valid one succeeds, if necessary after another `connect`.
- Bytes land only inside memory that the receiving side registered. Where the sink does the writing, they land only
  inside a grant, and only if they come from a peer that the grant is bound to (`bind`).

The peer chooses every byte of its description and of its grants, so the exception that those bytes cause decides what
happens to the peer:

- A `TransportError` means that blocks cannot travel. The link stays up and carries the reason to the peer.
- `MalformedDescription`, and every exception that is not a `TransportError`, means that the peer sent invalid bytes.
  The driver closes that peer's link with the text of the error, and touches no other room or link.

A transport therefore checks what its own safety requires, and needs no `except` for malformed numbers and texts. Before
an exception leaves a method, the method must release what it has acquired (descriptors, handles of other transports).
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
    """A peer's description cannot be decoded, or it contradicts itself. The driver closes the link that carried it."""


class OutOfReach(TransportError):
    """This transport can never connect the two ends, for example because they are on different machines."""


class Transport(ABC):
    """Base class of transports. A manager has one instance. All methods may be called from any thread.

    A manager calls `register`, then `describe`, then `connect` for each peer. For each offer the sink calls `grant`,
    and `bind` for each source; the sources call `submit` under that grant; the sink calls `revoke` when the room needs
    the pages back. When a peer is lost, the manager calls `note_lost` and `fence` (or `fence_dead`), and repeats them
    while the fence is not proven. `close` comes last.

    A transport implements the abstract methods, among them `_move`, which does the work of `submit`. It overrides
    `grant`, `bind` and `revoke` if its sink does the writing, and the other methods where their defaults do not fit.
    """

    name: ClassVar[str]
    """The name for settings, messages and metrics. Both ends of a transfer use the transport of the same name."""
    options: ClassVar[type[TransportOptions]] = TransportOptions
    """The struct of this transport's options. A transport with options is constructed with an instance of the struct,
    one without options (the default) with no argument."""

    key: SigningKey
    """The key pair of this instance. `describe` states the public half as `endpoint`; see `kit.claims`."""

    _memory: Ranges = Ranges.of(())
    """The memory that this side registered; `register` sets it. `submit` checks each source block against it."""

    @abstractmethod
    def register(self, memory: Sequence[MemoryRange]) -> None:
        """Make memory readable by this side's transfers and writable by peers. Called once, before `describe`.

        Args:
            memory: The pools of the engine, in host memory or on a device. They must stay mapped until `close`.

        Raises:
            ConfigurationError: This transport cannot use the memory. The caller must close the transport then.
        """

    @abstractmethod
    def describe(self) -> bytes:
        """Return what a peer needs in order to `connect` to this side.

        The description travels over an authenticated link, signed with `key`. The receiving manager checks the
        signature before it calls `connect`, so a peer cannot pass off another peer's description as its own.

        Returns:
            A msgpack map of at most `DESCRIPTION_BYTES` bytes, whose `endpoint` is `key.public`. `kit.descriptions`
            decodes a tagged struct whose tag is the transport's name.
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
            OutOfReach: This transport can never connect the two ends.
            MalformedDescription: The description is invalid.
            TransportError: The peer cannot be reached now. A later call may succeed.
        """

    def watch(self, description: bytes) -> int:
        """Return a handle that serves only for `fence`, for a peer that may write here but cannot be written to.

        `auto` calls this after `connect` has failed, because the peer may still choose this transport for its own
        writes. The default calls `connect` again.

        Args:
            description: What the peer's own `describe` returned.

        Returns:
            The peer's handle, as from `connect`.

        Raises:
            MalformedDescription: The description is invalid.
            TransportError: The peer cannot write here by this transport, so there is no writer to fence.
        """
        return self.connect(description)

    def grant(self, extents: Extents) -> bytes:  # noqa: ARG002 - the default enforces nothing
        """Allow writes into these extents by the peers that `bind` names.

        A transport whose sink does the writing enforces its grants. A one-sided transport cannot enforce them and
        returns `b""`.

        Args:
            extents: Addresses and lengths in bytes, in memory that this side registered.

        Returns:
            The token that the offer carries to the sources.

        Raises:
            TransportError: An extent lies outside the registered memory. Nothing is granted then. A transport that
                cannot enforce grants need not check this.
        """
        return b""

    def bind(self, grant: bytes, peer: int) -> None:  # noqa: B027 - the default enforces nothing
        """Allow one more peer to use the grant. Called before the token is sent to that peer.

        A transport whose sink does the writing refuses writes under this grant by any other peer, and both sides log
        the refusal. One-sided writes cannot be bound: the source's engine makes them without the sink, and a peer that
        can reach the memory for one request can reach it for every request.

        Args:
            grant: A token from `grant`. If it was revoked since, nothing is bound, which is not an error.
            peer: A handle from `connect` or `watch`. If it was fenced since, nothing is bound, which is not an error.
        """

    def revoke(self, grant: bytes) -> bool:  # noqa: ARG002
        """End a grant. A token that was revoked before is not an error.

        Args:
            grant: A token from `grant`.

        Returns:
            True if it is proven that no further byte lands under the grant. False if the sink cannot prove it, and
            only the writer can state that it has stopped.
        """
        return False

    def explain(self, peer: int) -> str:  # noqa: ARG002
        """Return one sentence for operators: how bytes reach this peer, and why that way.

        Args:
            peer: A handle from `connect`.

        Raises:
            TransportError: The handle is unknown, or the peer was fenced.
        """
        return self.name

    def transport_for(self, peer: int) -> str:  # noqa: ARG002
        """Return the name of the transport that moves blocks to this peer. Only `auto` returns another than its own.

        Args:
            peer: A handle from `connect`.

        Raises:
            TransportError: The handle is unknown, or the peer was fenced.
        """
        return self.name

    def warning(self) -> str:
        """Return a one-line warning for the operator, or "" if there is none. Valid after `register`."""
        return ""

    def staging_slots(self) -> dict[str, int]:
        """Return the number of staging slots in use, by state. All are zero when no transfer is in flight."""
        return {}

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Write this side's `blocks.src` to the peer's `blocks.dst`. Never blocks and never raises `TransportError`.

        This method normalises and checks the blocks, and calls `_move`.

        Args:
            peer: A handle from `connect`.
            blocks: Addresses and lengths in bytes. Each block must lie inside the memory that its side registered;
                otherwise the transfer fails, and no byte lands outside of that memory.
            grant: The token from the peer's offer.

        Returns:
            A future of the number of bytes written, or of the `TransportError`. After an error, some, all or none of
            the blocks may have landed in the peer's memory. Without blocks, the future is completed with 0.
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

        Args:
            peer: A handle from `connect`.

        Raises:
            TransportError: The handle is unknown, or the peer was fenced.
        """
        return None

    @abstractmethod
    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        """Start writing the blocks that `submit` has checked. Must not block.

        Another thread may have fenced the peer or closed this transport since that check.

        Args:
            peer: A handle from `connect`.
            blocks: At least one block, none of them empty, as contiguous uint64 arrays.
            grant: The token from the peer's offer.

        Returns:
            A running future, as from `kit.transfers.started`. It completes when no byte is read or written any longer.

        Raises:
            TransportError: The transfer is refused. `submit` returns it in a failed future.
        """

    @abstractmethod
    def fence(self, peer: int) -> bool:
        """Cut a peer off: fail its queued transfers, wait a bounded time for those in flight, drop the connection.

        May block for a second. Afterwards `submit` fails for this handle; `connect` makes the peer usable again.

        Args:
            peer: A handle from `connect` or `watch`.

        Returns:
            True if it is also proven that the peer can no longer write into this side's memory. The handle is then
            forgotten, and fencing it again returns True. False if there is no such proof now; the caller may try again.

        Raises:
            TransportError: `connect` and `watch` never returned this handle.
        """

    def note_lost(self, peer: int, host: str, others: frozenset[str]) -> None:  # noqa: B027 - most need nothing
        """Record which connections belong to a peer whose link was lost, before a successor opens similar ones.

        A transport that proves a fence by the state of the kernel's sockets needs this call, because a restarted peer
        opens connections that look like the old ones. May be called again, and may block for a moment. The default
        records nothing.

        Args:
            peer: The handle of the lost peer.
            host: The numeric address at the other end of the lost link.
            others: The numeric addresses of the peers that are linked now.
        """

    def fence_dead(self, peer: int) -> bool:
        """Fence a peer whose process has ended. Another peer has proven that end, so only bytes in transit can arrive.

        Args:
            peer: A handle from `connect` or `watch`.

        Returns:
            As for `fence`. False if this transport sees that the process is running.

        Raises:
            TransportError: `connect` and `watch` never returned this handle.
        """
        return self.fence(peer)

    @abstractmethod
    def close(self) -> None:
        """Fence all peers, unregister the memory and release resources. Idempotent; may block for seconds.

        Afterwards the future of every transfer is completed, and `submit` fails.
        """

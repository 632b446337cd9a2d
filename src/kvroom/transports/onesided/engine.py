"""The interface to an engine of another project: it begins a batch of one-sided writes and waits until it has landed.

An engine has no queues, fences or proofs; the rest of `onesided` adds them. Every method may block, except `begin`
while `begins_at_once` returns True. Calls for one session never overlap; calls for different sessions may.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit import machine
from kvroom.transports.kit.descriptions import decoded
from kvroom.transports.kit.devices import DeviceBatch
from kvroom.transports.kit.transfers import TransferRecord
from kvroom.wire.frames import UNDECODABLE

from .exposure import Guard
from .packing.protocol import Area

S = TypeVar("S")


class OneSidedDescription(msgspec.Struct, frozen=True):
    """The description that a one-sided transport sends to its peers: what they need to `connect` and to `fence`.

    An engine that identifies its peers by name uses `engine_name` of the endpoint.
    """

    endpoint: bytes
    """Public key of the transport instance."""
    process: machine.Process
    network: int
    """Inode of the network namespace."""
    memory: tuple[tuple[int, int, str], ...]
    """Registered memory: (address, nbytes, device)."""
    ports: tuple[int, ...]
    """TCP ports on which the engine listens."""
    engine: bytes
    """The engine's own card, as `OneSidedEngine.start` returned it."""
    staging: tuple[tuple[int, int, str], ...] = ()
    """Registered staging memory. Peers write only into slots of it that the pack server at `area` has leased to them.
    """
    area: Area | None = None

    @property
    def registered(self) -> list[MemoryRange]:
        """All memory that the peer's engine has registered, staging memory included."""
        return [MemoryRange(*each) for each in (*self.memory, *self.staging)]


def engine_name(endpoint: bytes) -> str:
    """Return the name of the engine of this endpoint. It is the endpoint in hex, so no other peer's engine has it."""
    return endpoint.hex()


C = TypeVar("C", bound=msgspec.Struct)


def read_card(name: str, described: OneSidedDescription, kind: type[C]) -> C:
    """Decode the card of the peer's engine; raise `MalformedDescription`. `name`: the transport's, for errors."""
    try:
        return decoded(described.engine, kind)
    except UNDECODABLE as error:
        raise MalformedDescription(f"{name}: the peer's description of its engine is malformed: {error}") from error


class EngineTransfer(TransferRecord):
    """One transfer to one peer."""

    def __init__(self, blocks: Blocks, grant: bytes = b"") -> None:
        super().__init__(blocks, grant)
        self.clean = True  # False during a call of the engine and after one that failed: bytes may be in flight
        self.begun: Any = None  # what `begin` returned in the submitting thread, for a worker to finish
        self.stopped = ""  # the reason why no further batch may begin; "" while one may
        self.abandoned = False  # True once the engine is about to stop: `finish` gives up a write that does not end


class OneSidedEngine(ABC, Generic[S]):
    """An engine that writes batches. `S` is its session with one peer. A batch goes from one device to one device."""

    most_blocks: int = 512
    """Largest number of blocks in a batch."""
    most_bytes: int = 64 << 20
    """Largest number of bytes in a batch."""
    depth: int = 1
    """Number of batches for one peer that may be in flight at a time."""
    # Measured with NIXL, microseconds packed and directly: 128 blocks of 512 bytes 476 and 435, 256 of them 510 and
    # 740, 256 of 2 KiB 699 and 751, 1,024 of 8 KiB 4054 and 4022.
    packed_blocks: int = 256
    """A transfer of fewer blocks is not packed."""
    packed_bytes: int = 4 << 10
    """A transfer whose blocks have this many bytes or more on average is not packed."""

    guard: Guard
    """Set by the transport before `start`. An engine that opens ports later does so inside `guard.call`."""

    def fabric(self) -> str:
        """Name the fabric that the engine uses and that no table of sockets shows, for errors; "" if there is none."""
        return ""

    @abstractmethod
    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        """Start, register the memory, and return the card that a peer's `join` needs. Raise `ConfigurationError`."""

    @abstractmethod
    def join(self, described: OneSidedDescription) -> S:
        """Return a session for writing to that peer; raise `TransportError` if the engine cannot reach it."""

    def begins_at_once(self, session: S) -> bool:  # noqa: ARG002
        """Return True if a small `begin` would take microseconds now, so that it may run in the submitting thread."""
        return False

    @abstractmethod
    def begin(self, session: S, batch: DeviceBatch) -> Any:
        """Begin to write a batch; return what `finish` needs, or None if all has landed. Raise `TransportError`."""

    @abstractmethod
    def finish(self, session: S, begun: Any, transfer: EngineTransfer) -> None:
        """Return when all of the batch has landed; raise `TransportError` if it failed or was abandoned."""

    @abstractmethod
    def leave(self, session: S) -> None:
        """End a session, after `finish` for each of its batches. Afterwards this process sends nothing more over it."""

    @abstractmethod
    def stop(self) -> None:
        """Unregister the memory and end. Called once, after `leave` for every session, and also if `start` failed."""

    @abstractmethod
    def way(self) -> str:
        """Return how the engine moves bytes, in a few words, for `Transport.explain`."""

"""What a one-sided transport asks of somebody else's engine: to begin a batch of writes, and to see it through.

An engine knows nothing of queues, fences or proof; `onesided` does all of that for it. Everything may block except
`begin` where `begins_at_once` says so. For one session there is one call at a time, for different ones several.
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
    """Our public key, what we registered, the ports on which our engine listens, and what the engine says of itself.

    An engine that keeps its peers by name is known by `engine_name` of the endpoint. `network` is the inode of the
    network namespace, `memory` has (address, nbytes, device). `staging`, registered as well, is written only by leave
    of the pack server that `area` names.
    """

    endpoint: bytes
    process: machine.Process
    network: int
    memory: tuple[tuple[int, int, str], ...]
    ports: tuple[int, ...]
    engine: bytes
    staging: tuple[tuple[int, int, str], ...] = ()
    area: Area | None = None

    @property
    def registered(self) -> list[MemoryRange]:
        """All that the peer's engine knows."""
        return [MemoryRange(*each) for each in (*self.memory, *self.staging)]


def engine_name(endpoint: bytes) -> str:
    """Return the name of the engine of this endpoint, under which no other peer's engine is met."""
    return endpoint.hex()


C = TypeVar("C", bound=msgspec.Struct)


def read_card(name: str, described: OneSidedDescription, kind: type[C]) -> C:
    """Decode what the peer's engine says of itself; raise `MalformedDescription`."""
    try:
        return decoded(described.engine, kind)
    except UNDECODABLE as error:
        raise MalformedDescription(f"{name}: what the peer's engine says of itself is malformed: {error}") from error


class EngineTransfer(TransferRecord):
    """One transfer. `stopped` says why no further batch of it shall begin, once that is so.

    `abandoned`: the engine is about to be ended; a write that cannot be ended otherwise shall be given up. `clean`: no
    call of the engine has failed.
    """

    def __init__(self, blocks: Blocks, grant: bytes = b"") -> None:
        super().__init__(blocks, grant)
        self.clean = True
        self.begun: Any = None  # what `begin` returned in the thread that submitted it, for a worker to finish
        self.stopped = ""
        self.abandoned = False


class OneSidedEngine(ABC, Generic[S]):
    """A batch is at most `most_blocks` blocks and `most_bytes` bytes, from one device to one device.

    Up to `depth` batches for a peer are under way at a time. A transfer is packed that has at least `packed_blocks`
    blocks, shorter than `packed_bytes` on the average. Measured with NIXL, microseconds packed and directly: 128 blocks
    of 512 bytes 476 and 435, 256 of them 510 and 740, 256 of 2 KiB 699 and 751, 1,024 of 8 KiB 4054 and 4022.
    """

    most_blocks: int = 512
    most_bytes: int = 64 << 20
    depth: int = 1
    packed_blocks: int = 256
    packed_bytes: int = 4 << 10

    guard: Guard  # set by the transport before `start`; an engine that opens ports later makes them through it

    def fabric(self) -> str:
        """Name what it moves bytes over that no table of sockets shows; "" if there is no such thing."""
        return ""

    @abstractmethod
    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        """Register the memory; return what a peer's `join` needs. Raise `ConfigurationError`."""

    @abstractmethod
    def join(self, described: OneSidedDescription) -> S:
        """Return a session for writing to that peer; raise `TransportError`."""

    def begins_at_once(self, session: S) -> bool:  # noqa: ARG002
        """Whether a small `begin` takes microseconds now, so that it may run in the thread that submits."""
        return False

    @abstractmethod
    def begin(self, session: S, batch: DeviceBatch) -> Any:
        """Start to write; return what `finish` needs, or None if all has landed already. Raise `TransportError`."""

    @abstractmethod
    def finish(self, session: S, begun: Any, transfer: EngineTransfer) -> None:
        """Return when all of the batch has landed; raise `TransportError` where it failed or was abandoned."""

    @abstractmethod
    def leave(self, session: S) -> None:
        """End a session of which every batch was finished. Afterwards this process sends nothing more of it."""

    @abstractmethod
    def stop(self) -> None:
        """Unregister and end. Called once, when every session has been left; also where `start` failed."""

    @abstractmethod
    def way(self) -> str:
        """Say by what means it moves bytes, for people."""

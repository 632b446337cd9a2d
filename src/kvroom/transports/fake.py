"""`fake`: every transfer completes immediately and moves no byte. For warm-up, and to measure all costs but the copies.

It refuses what other transports refuse, so that rooms over it go through the same phases and fail for the same reasons.
Since nothing is ever written, every revoke and every fence is proof. `auto` never chooses it, and a manager that uses
it logs a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.wire.keys import SigningKey

from .base import Transport
from .kit.descriptions import read_description
from .kit.peers import PeerTable
from .kit.probing import ProbeResult
from .kit.ranges import Ranges
from .kit.transfers import Transfer, finished

_GRANT = b"fake"
_WARNING = "transport fake moves no bytes: the decode side's pages keep the content that they had before"


class _FakeDescription(msgspec.Struct, frozen=True, tag="fake"):
    endpoint: bytes
    ranges: tuple[tuple[int, int], ...]


def probe() -> ProbeResult:
    """Return that this transport is always available and moves no bytes."""
    return ProbeResult(
        "kvroom", devices=("cpu", "cuda", "npu"), notes=("moves no bytes; for warm-up and measurements",)
    )


class FakeTransport(Transport):
    """Accept memory of any device, and touch none of it."""

    name: ClassVar[str] = "fake"

    def __init__(self) -> None:
        self.key = SigningKey()
        self._peers: PeerTable[Ranges] = PeerTable(self.name)
        self._closed = threading.Event()

    def register(self, memory: Sequence[MemoryRange]) -> None:
        listed = list(memory)
        for piece in listed:
            if piece.nbytes <= 0 or piece.address <= 0:
                raise ConfigurationError(f"{piece} is not memory: address and nbytes must be positive")
        self._memory = Ranges.of(listed)

    def describe(self) -> bytes:
        ranges = tuple((int(a), int(b - a)) for a, b in zip(self._memory.start, self._memory.stop, strict=True))
        return msgspec.msgpack.encode(_FakeDescription(self.key.public, ranges))

    def connect(self, description: bytes) -> int:
        described = read_description(description, _FakeDescription)
        self._check_open()
        return self._peers.add(described.endpoint, Ranges.of(MemoryRange(*each) for each in described.ranges))

    def explain(self, peer: int) -> str:
        self._peers.get(peer)
        return "fake: selected by name, moves no bytes"

    def warning(self) -> str:
        return _WARNING

    def grant(self, extents: Extents) -> bytes:
        self._memory.check("granted", extents.address, extents.length, "this side registered")
        return _GRANT

    def revoke(self, grant: bytes) -> bool:  # noqa: ARG002 - nothing was ever written under it
        return True

    def _peer_memory(self, peer: int) -> Ranges:
        self._check_open()
        return self._peers.get(peer)

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:  # noqa: ARG002 - nothing is written
        return finished(blocks.nbytes)

    def fence(self, peer: int) -> bool:
        self._peers.find(peer)  # raises for an unknown handle
        self._peers.forget(peer)
        return True

    def close(self) -> None:
        self._closed.set()
        for handle in self._peers.all():
            self._peers.forget(handle)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise TransportError("fake: this transport is closed")

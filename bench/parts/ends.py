"""One end of something that moves blocks, as a benchmark drives it: ours or somebody else's, all look alike."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import create
from kvroom.transports.kit.pool import Pool
from kvroom.transports.kit.ranges import u64


class Way(NamedTuple):
    """How something bare is driven: `blocks` a batch (0: all in one), `depth` batches at once (0: one, in one call)."""

    blocks: int = 0
    depth: int = 1

    def __str__(self) -> str:
        return f"{self.blocks or 'all'}x{self.depth}" if self.depth else f"{self.blocks} sync"


class End(ABC):
    """Made in both processes with a pool each; first the source meets the sink, then the sink the source."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @abstractmethod
    def card(self) -> bytes:
        """Return what the other end's `meet` needs. The source's is asked for after it has met the sink."""

    @abstractmethod
    def meet(self, card: bytes) -> None:
        """Connect."""

    @abstractmethod
    def move(self, blocks: Blocks, way: Way) -> None:
        """Write the blocks into the other end's pool, and return when all have landed. Raise if any has not."""

    def take(self, blocks: Blocks) -> None:  # noqa: B027 - most sinks have no part in it
        """Receive the blocks, where a sink has to."""

    @abstractmethod
    def close(self) -> None:
        """End connections and threads."""


class Ours(End):
    """A transport of kvroom, its grant taken once and used for every transfer."""

    def __init__(self, pool: Pool, transport: str, **options: Any) -> None:
        super().__init__(pool)
        self._transport = create(transport, **options)
        self._transport.register([MemoryRange(pool.address, pool.nbytes)])
        self._peer = 0
        self._grant = b""
        self._given = self._transport.grant(Extents(u64([pool.address]), u64([pool.nbytes])))

    def card(self) -> bytes:
        return len(self._given).to_bytes(4, "big") + self._given + self._transport.describe()

    def meet(self, card: bytes) -> None:
        size = 4 + int.from_bytes(card[:4], "big")
        self._grant, self._peer = card[4:size], self._transport.connect(card[size:])
        self._transport.bind(self._given, self._peer)

    def move(self, blocks: Blocks, way: Way) -> None:  # noqa: ARG002 - it chooses for itself
        self._transport.submit(self._peer, blocks, self._grant).result()

    def close(self) -> None:
        self._transport.close()


class BareMemory(End):
    """The yardstick of `memory`: ctypes.memmove block by block, in order."""

    def card(self) -> bytes:
        return b""

    def meet(self, card: bytes) -> None:
        pass

    def move(self, blocks: Blocks, way: Way) -> None:  # noqa: ARG002
        for src, dst, nbytes in zip(*(part.tolist() for part in blocks), strict=True):
            ctypes.memmove(dst, src, nbytes)

    def close(self) -> None:
        pass

"""The interface of one end that moves blocks, for kvroom's transports and for third-party engines."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import create
from kvroom.transports.kit.pool import Pool
from kvroom.transports.kit.ranges import u64


class Way(NamedTuple):
    """The way to drive a bare engine: `blocks` a batch (0: all), `depth` batches in flight (0: a synchronous call)."""

    blocks: int = 0
    depth: int = 1

    def __str__(self) -> str:
        return f"{self.blocks or 'all'}x{self.depth}" if self.depth else f"{self.blocks} sync"


class End(ABC):
    """One end with its pool. The source meets the sink first, and then the sink meets the source."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @abstractmethod
    def card(self) -> bytes:
        """Return the argument for the other end's `meet`. The source is asked for it after it has met the sink."""

    @abstractmethod
    def meet(self, card: bytes) -> None:
        """Connect to the other end, whose card this is."""

    @abstractmethod
    def move(self, blocks: Blocks, way: Way) -> None:
        """Write the blocks into the other end's pool, and return when all have landed. Raise if any has not."""

    def take(self, blocks: Blocks) -> None:  # noqa: B027 - most sinks have no part in it
        """Receive the blocks; only a sink that takes part in the transfer needs this."""

    @abstractmethod
    def close(self) -> None:
        """Close connections and end threads."""


class Ours(End):
    """A transport of kvroom. One grant is issued at the start and used for every transfer."""

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

"""A one-sided transport within this process whose engine waits: the test decides when a write lands."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transport_helpers import Side

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.devices import DeviceBatch
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided.engine import EngineTransfer, OneSidedDescription, OneSidedEngine
from kvroom.transports.onesided.options import OneSidedOptions
from kvroom.transports.onesided.transport import OneSidedTransport

POOL_BYTES = 16 << 20


class _Description(OneSidedDescription, frozen=True, tag="gated"):
    pass


class GatedEngine(OneSidedEngine[str]):
    """An engine in which a batch lands in `finish`, after `gate`; the next one fails if `fails` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fails = ""
        self.written: list[DeviceBatch] = []
        self.memory: list[MemoryRange] = []

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        self.memory = list(memory)
        return b""

    def join(self, described: OneSidedDescription) -> str:
        return "joined"

    def begin(self, session: str, batch: DeviceBatch) -> Any:
        return batch

    def finish(self, session: str, begun: DeviceBatch, job: EngineTransfer) -> None:
        assert self.gate.wait(20)
        text, self.fails = self.fails, ""
        if text:
            raise TransportError(text)
        for src, dst, length in zip(*(part.tolist() for part in begun.blocks), strict=True):
            ctypes.memmove(dst, src, length)
        self.written.append(begun)

    def leave(self, session: str) -> None:
        return

    def stop(self) -> None:
        return

    def way(self) -> str:
        return "by hand"


class Gated(OneSidedTransport[str]):
    name: ClassVar[str] = "gated"
    description: ClassVar[type[OneSidedDescription]] = _Description

    def __init__(self, options: OneSidedOptions | None = None) -> None:
        self.engine = GatedEngine()
        super().__init__(self.engine, options)


def side(fill: int, **options: Any) -> Side[Gated]:
    return Side(Gated(OneSidedOptions(**options)), fill, POOL_BYTES)


def met(source: Side[Gated], sink: Side[Gated]) -> int:
    """Connect both; return the source's handle of the sink."""
    sink.transport.connect(source.transport.describe())
    return source.transport.connect(sink.transport.describe())


def pieces(source: Side[Gated], sink: Side[Gated], count: int = 4096, nbytes: int = 512, gap: int = 0) -> Blocks:
    """Return every second piece of the source, adjacent in the sink, or with gaps there."""
    number = np.arange(count, dtype=np.uint64)
    src = np.uint64(source.pool.address) + number * np.uint64(2 * nbytes)
    dst = np.uint64(sink.pool.address) + number * np.uint64(nbytes + gap)
    return Blocks(src, dst, np.full(count, nbytes, np.uint64))


def idle(*sides: Side[Gated]) -> bool:
    return not any(any(each.transport.staging_slots().values()) for each in sides)


def one(value: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return u64([value])

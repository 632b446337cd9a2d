"""One transport of this process with one registered pool, and arrays of its bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from kvroom.conformance.ends import End
from kvroom.plan.blocks import Blocks, Extents, MemoryRange
from kvroom.transports import Transport
from kvroom.transports.kit.pool import allocate
from kvroom.transports.kit.ranges import u64

T = TypeVar("T", bound=Transport)
NBYTES = 1 << 20
PAGE = 4096


class Side(Generic[T]):
    """A transport, its pool as `bytes` (uint8[nbytes]), and a way to grant all of it."""

    def __init__(self, transport: T, fill: int, nbytes: int = NBYTES, shared: bool = False) -> None:
        self.transport = transport
        self.pool = allocate(nbytes, shared=shared)
        self.bytes = np.frombuffer(self.pool.buffer, np.uint8)
        self.bytes[:] = fill
        transport.register([MemoryRange(self.pool.address, nbytes)])

    def grant(self, *peers: int) -> bytes:
        """Grant the whole pool to these peers, given by handle, or to every connected one; return the token."""
        grant = self.transport.grant(Extents(u64([self.pool.address]), u64([self.pool.nbytes])))
        for peer in peers or self.transport._peers.all():  # type: ignore[attr-defined]  # every transport has it
            self.transport.bind(grant, peer)
        return grant

    def __enter__(self) -> Side[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()


def block(source: Side[T], sink: Side[T], nbytes: int, at: int = 0) -> Blocks:
    """Return one block from the beginning of the source's pool to `at` in the sink's."""
    return Blocks(u64([source.pool.address]), u64([sink.pool.address + at]), u64([nbytes]))


def move_page(source: End, sink: End, peer: int, grant: bytes = b"") -> int:
    """Write a page from the beginning of the source's only pool to the beginning of the sink's."""
    return source.move(peer, Blocks(u64(source.addresses), u64(sink.addresses), u64([PAGE])), grant)


def wait_until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Yield the processor until the condition holds; for events without a signal, such as a byte that lands."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        os.sched_yield()

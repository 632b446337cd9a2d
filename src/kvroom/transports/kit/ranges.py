"""Byte ranges, and the check that blocks lie inside them. NumPy over blocks, no Python loop.

Pure: no sockets, no threads, no system calls. Addresses are bytes; ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import U64, MemoryRange


def u64(values: Iterable[int]) -> U64:
    """Return the values as uint64[n]. NumPy would turn lists of Python ints above 2^63 into floats."""
    return np.fromiter(values, dtype=np.uint64)


_PAIRS = 400  # up to this number of pairs of a block and a range, all pairs are compared


class Ranges:
    """A sorted set of byte ranges, with overlaps merged, against which whole arrays of blocks are checked."""

    def __init__(self, address: U64, length: U64) -> None:
        self.start: U64 = address
        self.stop: U64 = address + length
        if not (address[1:] > self.stop[:-1]).all():
            order = np.argsort(self.start, kind="stable")
            start, stop = self.start[order], np.maximum.accumulate(self.stop[order])
            first = np.ones(start.size, dtype=bool)
            first[1:] = start[1:] > stop[:-1]
            self.start, self.stop = start[first], stop[np.roll(first, -1)]
        self._size: U64 = self.stop - self.start

    @classmethod
    def of(cls, memory: Iterable[MemoryRange]) -> Ranges:
        """Return the union of memory ranges."""
        listed = list(memory)
        return cls(u64(m.address for m in listed), u64(m.nbytes for m in listed))

    def first_outside(self, address: U64, length: U64) -> int | None:
        """Return the index of the first block that is not entirely inside one range, or None if all are inside."""
        if not address.size:
            return None
        if not self.start.size:
            return 0
        start, size = self.start, self._size
        if start.size > 1 and start.size * address.size <= _PAIRS:
            # Compare each block with each range: for so few numbers, the release of the GIL by searchsorted costs more.
            offset = address - start[:, None]  # wraps around for an address before the range
            inside = ((offset <= size[:, None]) & (length <= size[:, None] - offset)).any(axis=0)
            return None if inside.all() else int(np.argmin(inside))
        if start.size > 1:
            # An address before the first range gets index -1, the last range, and its offset there wraps around.
            index = np.searchsorted(start, address, side="right") - 1
            start, size = start[index], size[index]
        offset = address - start
        inside = (offset <= size) & (length <= size - offset)
        return None if inside.all() else int(np.argmin(inside))

    def check(self, side: str, address: U64, length: U64, promise: str) -> None:
        """Raise `TransportError` for the first block that is outside.

        Args:
            side: The side that the blocks lie on, for the message: "source", "destination", "granted".
            address: uint64[n], the addresses of the blocks.
            length: uint64[n], their lengths in bytes.
            promise: The origin of the ranges, which completes "the memory that ..." in the message.
        """
        bad = self.first_outside(address, length)
        if bad is not None:
            raise TransportError(
                f"{side} block {bad} of {address.size} (address {int(address[bad]):#x}, {int(length[bad])} bytes)"
                f" lies outside the memory that {promise}; nothing was written there"
            )

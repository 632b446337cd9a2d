"""Copies of many small blocks of host memory by NumPy, without a Python loop over blocks and without holding the GIL.

Memory is viewed as overlapping cells, one starting at each byte. An index into that view is an address, so no alignment
is required, and only the bytes of the blocks are touched. Blocks of equal size take one index operation; every other
block is covered by two overlapping cells, whose size is the largest power of two that fits. The caller must have
checked the addresses.

The module touches memory only: no sockets, no clock. Measured on one machine, a block of 128 bytes takes 30 to 40 ns
here, 600 ns by `memmove` through ctypes, and by process_vm_writev(2) 120 ns for a segment of the local side and 400 ns
for one of the remote side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import U64, Blocks

Bytes = npt.NDArray[np.uint8]
CHUNK_BYTES = 2 << 20  # with two threads, the calls around each chunk cost half the speed at 256 KiB, a tenth at 1 MiB
_STEP_BYTES = 1 << 16
_SIZES = 4  # up to this number of different sizes, each size takes one index operation of its own


class ByteRuns(NamedTuple):
    """Byte ranges of one side's memory, in the order of the bytes that they hold."""

    address: U64
    length: U64


def merged(address: U64, length: U64) -> ByteRuns:
    """Return the same bytes in the same order as fewer ranges, by merging adjacent ones. No range may be empty."""
    joined = address[:-1] + length[:-1] == address[1:]
    if not joined.any():
        return ByteRuns(address, length)
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return ByteRuns(address[first], np.add.reduceat(length, first))


def chunks(length: U64, most_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
    """Return runs [start, stop) of blocks. A run has at most `most_bytes` in all, or is a single longer block."""
    ends = np.cumsum(length)
    found: list[tuple[int, int]] = []
    start, taken = 0, 0
    while start < ends.size:
        stop = max(start + 1, int(np.searchsorted(ends, np.uint64(taken + most_bytes), side="right")))
        found.append((start, stop))
        start, taken = stop, int(ends[stop - 1])
    return found


class Workspace:
    """A reusable buffer to gather into.

    Fresh memory costs more than the copy if the allocator maps and unmaps it each time: 0.5 GB/s instead of 1.6.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Bytes:
        """Return uint8[nbytes], which is valid until the next call."""
        if self._memory.size < nbytes:
            self._memory = np.empty(max(nbytes, CHUNK_BYTES), np.uint8)
        return self._memory[:nbytes]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_scratch = _Scratch()


def gathered(address: U64, length: U64, out: Bytes | None = None) -> Bytes:
    """Return the bytes of these ranges, concatenated in `out`, uint8[sum of length].

    Without `out`, the result is a buffer of the calling thread, valid until the thread's next call.
    """
    if out is None:
        out = _scratch.workspace.take(int(length.sum()))
    size = _uniform_size(length)
    if size:
        cells_out, first = out.view(f"V{size}"), address.min()
        offset = address - first
        rows = offset // np.uint64(size)
        if (rows * np.uint64(size) == offset).all():  # on a grid: copied without an intermediate array
            grid = np.asarray(_RawMemory(int(first), int(rows.max()) + 1, f"|V{size}", size))
            np.take(grid, rows.view(np.intp), out=cells_out, mode="clip")
            return out
        cells, index = _cells(address, size), offset.view(np.intp)
        for part in _steps(index.size, size):
            cells_out[part] = cells[index[part]]
        return out
    for where, offset, size in _by_size(address, length):
        cells, index, target = _cells(where, size), _index(where, where.min()), _cells_of(out, size)
        for part in _steps(index.size, size):
            target[offset[part]] = cells[index[part]]
    return out


def _steps(count: int, size: int) -> Iterator[slice]:
    """Yield slices of `count` cells whose intermediate arrays stay in the cache."""
    step = max(1, _STEP_BYTES // size)
    return (slice(start, start + step) for start in range(0, count, step))


def scatter(packed: Bytes, address: U64, length: U64) -> None:
    """Write the bytes of `packed`, uint8[sum of length], to these ranges, which must not overlap."""
    size = _uniform_size(length)
    if size:
        _cells(address, size)[_index(address, address.min())] = packed.view(f"V{size}")
        return
    for where, offset, size in _by_size(address, length):
        cells, index, source = _cells(where, size), _index(where, where.min()), _cells_of(packed, size)
        for part in _steps(index.size, size):
            cells[index[part]] = source[offset[part]]


def copy(blocks: Blocks) -> None:
    """Copy all blocks within this process."""
    for start, stop in chunks(blocks.length):
        src, dst, length = (part[start:stop] for part in blocks)
        scatter(gathered(*merged(src, length)), *merged(dst, length))


def pack(address: U64, length: U64, to: int) -> None:
    """Concatenate the bytes of these ranges at address `to`."""
    for start, stop in chunks(length):
        runs = merged(address[start:stop], length[start:stop])
        nbytes = int(runs.length.sum())
        gathered(*runs, memory(to, nbytes))
        to += nbytes


def whole(packed: Bytes) -> ByteRuns:
    """Return packed bytes as one range, for calls that take addresses; the caller keeps the array alive."""
    return ByteRuns(np.array([packed.__array_interface__["data"][0]], np.uint64), np.array([packed.size], np.uint64))


class _RawMemory:
    """Memory of this process, described by NumPy's array interface."""

    def __init__(self, address: int, count: int, kind: str, step: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, False),
            "shape": (count,),
            "typestr": kind,
            "strides": (step,),
        }


def memory(address: int, nbytes: int) -> Bytes:
    """Return memory of this process as uint8[nbytes]. The caller must keep it mapped."""
    return np.asarray(_RawMemory(address, nbytes, "|u1", 1))


def _cells(address: U64, size: int) -> npt.NDArray[np.void]:
    """Return the cells of `size` bytes that start at each byte from the lowest address to the highest."""
    first = int(address.min())
    return np.asarray(_RawMemory(first, int(address.max()) - first + 1, f"|V{size}", 1))


def _cells_of(packed: Bytes, size: int) -> npt.NDArray[np.void]:
    base = packed.__array_interface__["data"][0]
    return np.asarray(_RawMemory(base, packed.size - size + 1, f"|V{size}", 1))


def _index(address: U64, first: np.uint64) -> npt.NDArray[np.intp]:
    return (address - first).view(np.intp)


def _uniform_size(length: U64) -> int:
    """Return the size of the blocks if they all have the same size, else 0."""
    size = int(length[0]) if length.size else 0
    return size if size and (length == length[0]).all() else 0


def _by_size(address: U64, length: U64) -> list[tuple[U64, npt.NDArray[np.intp], int]]:
    """Return cells that cover the blocks: for each size, the addresses and the offsets in the packed bytes."""
    offset = np.cumsum(length) - length
    sizes = np.unique(length)
    if sizes.size > _SIZES:
        size = np.left_shift(np.uint64(1), (np.frexp(length.astype(np.float64))[1] - 1).astype(np.uint64))
        rest = length - size
        address, offset = np.concatenate((address, address + rest)), np.concatenate((offset, offset + rest))
        length = np.concatenate((size, size))
        sizes = np.unique(size)
    found = []
    for size in sizes.tolist():
        mine = length == np.uint64(size)
        found.append((address[mine], offset[mine].view(np.intp), int(size)))
    return found

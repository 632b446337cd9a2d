"""What every transport does with blocks before it moves them: check, split, batch. NumPy over blocks, no Python loop.

Pure: no sockets, no threads, no system calls. Addresses are bytes; ranges are half-open.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import U64, Blocks, MemoryRange
from kvroom.transports.base import MalformedDescription, Transfer
from kvroom.wire.frames import UNDECODABLE


def started() -> Transfer:
    """Return a future that only its transport can finish: it cannot be cancelled from outside."""
    future: Transfer = Future()
    future.set_running_or_notify_cancel()
    return future


def finished(nbytes: int) -> Transfer:
    """Return a future that is done already."""
    future = started()
    future.set_result(nbytes)
    return future


def failed(error: TransportError) -> Transfer:
    """Return a future that failed already: nothing was moved."""
    future = started()
    future.set_exception(error)
    return future


def u64(values: Iterable[int]) -> U64:
    """Return the values as uint64[n]; lists of Python ints above 2^63 would become floats otherwise."""
    return np.fromiter(values, dtype=np.uint64)


D = TypeVar("D", bound=msgspec.Struct)
_decoding = threading.Lock()


def decoded(raw: bytes, kind: type[D]) -> D:
    """Decode a struct from any thread.

    msgspec (0.22) looks into a type at its first use, and two threads that do so at once can crash the process.
    """
    with _decoding:
        return msgspec.msgpack.decode(raw, type=kind)


def read_description(raw: bytes, kind: type[D]) -> D:
    """Decode what a peer said of itself; `kind` is a tagged struct whose tag is the transport's name.

    Raise `TransportError` for the description of another transport, naming both, and `MalformedDescription` for what is
    no description at all.
    """
    name = kind.__struct_config__.tag
    try:
        return decoded(raw, kind)
    except UNDECODABLE as error:
        other = _tag(raw)
        if other not in (None, name):
            raise TransportError(
                f"this side uses transport {name}, the peer uses {other}: choose the same on both sides"
            ) from error
        raise MalformedDescription(f"{name}: the peer's description is malformed: {error}") from error


class _Tagged(msgspec.Struct):
    type: Annotated[str, Meta(pattern="^[a-z0-9_-]{1,32}$")]


def _tag(raw: bytes) -> str | None:
    try:
        return decoded(raw, _Tagged).type
    except UNDECODABLE:
        return None


_FEW = 400


class Ranges:
    """A set of byte ranges, merged and sorted, that answers for whole arrays of blocks whether they lie inside."""

    def __init__(self, address: U64, length: U64) -> None:
        self.start: U64 = address
        self.stop: U64 = address + length
        if not (address[1:] > self.stop[:-1]).all():
            self._merge()
        self._size: U64 = self.stop - self.start

    def _merge(self) -> None:
        order = np.argsort(self.start, kind="stable")
        start, stop = self.start[order], np.maximum.accumulate(self.stop[order])
        first = np.ones(start.size, dtype=bool)
        first[1:] = start[1:] > stop[:-1]
        self.start, self.stop = start[first], stop[np.roll(first, -1)]

    @classmethod
    def of(cls, memory: Iterable[MemoryRange]) -> Ranges:
        """Return the union of memory ranges."""
        listed = list(memory)
        return cls(u64(m.address for m in listed), u64(m.nbytes for m in listed))

    def first_outside(self, address: U64, length: U64) -> int | None:
        """Return the index of the first block that is not wholly inside one merged range, or None if all are inside."""
        if not address.size:
            return None
        if not self.start.size:
            return 0
        start, size = self.start, self._size
        if start.size > 1 and start.size * address.size <= _FEW:
            # Compare all with all: searchsorted would hand the interpreter to other threads for a few numbers.
            offset = address - start[:, None]  # before a range: it wraps around
            inside = ((offset <= size[:, None]) & (length <= size[:, None] - offset)).any(axis=0)
            return None if inside.all() else int(np.argmin(inside))
        if start.size > 1:
            index = np.searchsorted(start, address, side="right") - 1  # -1, before the first: the offset wraps around
            start, size = start[index], size[index]
        offset = address - start
        inside = (offset <= size) & (length <= size - offset)
        return None if inside.all() else int(np.argmin(inside))

    def check(self, side: str, address: U64, length: U64, promise: str) -> None:
        """Raise `TransportError` naming the first block that is outside; `promise` says what the ranges are."""
        bad = self.first_outside(address, length)
        if bad is not None:
            raise TransportError(
                f"{side} block {bad} of {address.size} (address {int(address[bad]):#x}, {int(length[bad])} bytes)"
                f" lies outside the memory that {promise}; nothing was written there"
            )


def cpu_memory(name: str, memory: Iterable[MemoryRange]) -> list[MemoryRange]:
    """Return the ranges as a list; raise `ConfigurationError` for one that is empty or not in host memory."""
    return device_memory(name, memory, ("cpu",))


def device_memory(name: str, memory: Iterable[MemoryRange], kinds: Sequence[str]) -> list[MemoryRange]:
    """Return the ranges as a list, checked. `kinds`: what transport `name` moves, "cuda" standing for every "cuda:N".

    Raise `ConfigurationError` for a range that is empty, that lies on a device of another kind, or that shares bytes
    with one on another device.
    """
    listed = list(memory)
    for piece in listed:
        if kind_of(piece.device) not in kinds:
            raise ConfigurationError(
                f"transport {name} moves {' and '.join(kinds)} memory only, but a region lies on {piece.device!r}: "
                f"keep the KV pool in {' or '.join(kinds)} memory or choose a transport for that device"
            )
        if piece.nbytes <= 0 or piece.address <= 0:
            raise ConfigurationError(f"{piece} is not memory: address and nbytes must be positive")
    widest = MemoryRange(0, 0)  # of those that begin earlier, the one that ends last
    for piece in sorted(listed):
        if piece.address < widest.address + widest.nbytes and piece.device != widest.device:
            raise ConfigurationError(f"{widest} and {piece} share bytes: an address is on one device; correct them")
        widest = max(widest, piece, key=lambda each: each.address + each.nbytes)
    return listed


def joined(memory: Iterable[MemoryRange]) -> list[MemoryRange]:
    """Return the same memory, sorted; pieces of host memory that touch are one, so that a block may lie across them.

    Memory of other devices stays as it is: touching pieces may be different allocations, which drivers keep apart.
    """
    pieces: list[MemoryRange] = []
    for piece in sorted(memory):
        last = pieces[-1] if pieces else None
        if last is not None and last.device == piece.device == "cpu" and piece.address <= last.address + last.nbytes:
            pieces[-1] = last._replace(nbytes=max(last.nbytes, piece.address + piece.nbytes - last.address))
        else:
            pieces.append(piece)
    return pieces


def kind_of(device: str) -> str:
    """Return "cuda" for "cuda:1", "cpu" for "cpu"."""
    return device.partition(":")[0]


class Devices:
    """On which device each address is. `names` are the devices in the order of the ranges, each once; at least one.

    It answers for addresses inside the ranges, which `Ranges.check` makes sure of; without ranges all is on the host.
    """

    def __init__(self, memory: Iterable[MemoryRange]) -> None:
        listed = sorted(memory)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(piece.device for piece in listed)) or ("cpu",)
        turns = [piece for i, piece in enumerate(listed) if not i or piece.device != listed[i - 1].device]
        self._start = u64(piece.address for piece in turns[1:])
        self._device = np.array([self.names.index(piece.device) for piece in turns] or [0], dtype=np.intp)

    def of(self, address: U64) -> npt.NDArray[np.intp]:
        """Return for each address, uint64[n], the index in `names` of its device: intp[n]."""
        return self._device[np.searchsorted(self._start, address, side="right")]


class Group(NamedTuple):
    """Blocks that all go from one device to one device."""

    source: str
    sink: str
    blocks: Blocks


def by_device(blocks: Blocks, here: Devices, there: Devices) -> list[Group]:
    """Return the same copies by pairs of devices, in the order of `names`; within a group they keep their order.

    Where both sides have one device only, the blocks are not looked at.
    """
    sinks = len(there.names)
    if len(here.names) * sinks == 1:
        return [Group(here.names[0], there.names[0], blocks)]
    pair = here.of(blocks.src) * sinks + there.of(blocks.dst)
    groups = []
    for each in np.flatnonzero(np.bincount(pair, minlength=1)).tolist():
        mine = pair == each
        part = blocks if mine.all() else Blocks(blocks.src[mine], blocks.dst[mine], blocks.length[mine])
        groups.append(Group(here.names[each // sinks], there.names[each % sinks], part))
    return groups


def normal(blocks: Blocks) -> Blocks:
    """Return the blocks as contiguous uint64 arrays without empty blocks; raise `TransportError` if sizes differ."""
    src, dst, length = (np.ascontiguousarray(part, dtype=np.uint64) for part in blocks)
    if not src.shape == dst.shape == length.shape or src.ndim != 1:
        raise TransportError(f"blocks need three arrays of one size, got {src.shape}, {dst.shape} and {length.shape}")
    if length.all():
        return Blocks(src, dst, length)
    keep = length > 0
    return Blocks(src[keep], dst[keep], length[keep])


def split(blocks: Blocks, piece_bytes: int) -> Blocks:
    """Return the same copies with every block at most `piece_bytes` long, in the same order."""
    src, dst, length = blocks
    if not length.size or int(length.max()) <= piece_bytes:
        return blocks
    pieces = (length + np.uint64(piece_bytes - 1)) // np.uint64(piece_bytes)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces.astype(np.int64))
    offset = (np.arange(first.size, dtype=np.uint64) - first) * np.uint64(piece_bytes)
    owner = np.repeat(np.arange(length.size), pieces.astype(np.int64))
    left = length[owner] - offset
    return Blocks(src[owner] + offset, dst[owner] + offset, np.minimum(left, np.uint64(piece_bytes)))


def cut(blocks: Blocks, most_blocks: int, most_bytes: int) -> tuple[Blocks, list[tuple[int, int]]]:
    """Return the same copies, split if need be, and runs [start, stop) of them of at most so many blocks and bytes."""
    count, nbytes = blocks.length.size, blocks.nbytes
    if count <= most_blocks and nbytes <= most_bytes:
        return blocks, [(0, count)] if count else []
    blocks = split(blocks, most_bytes)
    ends = np.cumsum(blocks.length)
    runs: list[tuple[int, int]] = []
    start, taken = 0, 0
    while start < ends.size:
        fits = int(np.searchsorted(ends, np.uint64(taken + most_bytes), side="right"))
        stop = min(fits, start + most_blocks)
        runs.append((start, stop))
        start, taken = stop, int(ends[stop - 1])
    return blocks, runs

"""Devices of memory: those that a transport supports, and those that blocks lie on. NumPy over blocks, no Python loop.

Pure: no sockets, no threads, no system calls. A device is named as torch names it: "cpu", "cuda:1".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import U64, Blocks, MemoryRange

from .ranges import u64


def cpu_memory(name: str, memory: Iterable[MemoryRange]) -> list[MemoryRange]:
    """Return the ranges as a list; raise `ConfigurationError` for one that is empty or not in host memory."""
    return device_memory(name, memory, ("cpu",))


def device_memory(name: str, memory: Iterable[MemoryRange], kinds: Sequence[str]) -> list[MemoryRange]:
    """Check memory ranges and return them as a list.

    Args:
        name: The transport, for messages.
        memory: The ranges.
        kinds: The kinds of devices that the transport supports; "cuda" stands for every "cuda:N".

    Raises:
        ConfigurationError: A range is empty, lies on an unsupported device, or overlaps a range on another device.
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
    widest = MemoryRange(0, 0)  # of the ranges that begin earlier, the one that ends last
    for piece in sorted(listed):
        if piece.address < widest.address + widest.nbytes and piece.device != widest.device:
            raise ConfigurationError(
                f"{widest} and {piece} overlap, but are on different devices: correct their addresses or devices"
            )
        widest = max(widest, piece, key=lambda each: each.address + each.nbytes)
    return listed


def joined(memory: Iterable[MemoryRange]) -> list[MemoryRange]:
    """Return the same memory, sorted, with adjacent ranges of host memory merged, so that a block may span them.

    Ranges on other devices are not merged: adjacent ones may be different allocations, which drivers keep apart.
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
    """A map from addresses to devices.

    `names` lists each device once, in the order of the ranges; there is at least one. The map is valid for addresses
    inside the ranges, which `Ranges.check` verifies. Without ranges, all addresses are on the host.
    """

    def __init__(self, memory: Iterable[MemoryRange]) -> None:
        listed = sorted(memory)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(piece.device for piece in listed)) or ("cpu",)
        turns = [piece for i, piece in enumerate(listed) if not i or piece.device != listed[i - 1].device]
        self._start = u64(piece.address for piece in turns[1:])
        self._device = np.array([self.names.index(piece.device) for piece in turns] or [0], dtype=np.intp)

    def of(self, address: U64) -> npt.NDArray[np.intp]:
        """Return the index in `names` of each address's device: uint64[n] -> intp[n]."""
        return self._device[np.searchsorted(self._start, address, side="right")]


class DeviceBatch(NamedTuple):
    """Blocks that all go from one device to one device."""

    source: str
    sink: str
    blocks: Blocks


def by_device(blocks: Blocks, here: Devices, there: Devices) -> list[DeviceBatch]:
    """Group copies by pair of devices, in the order of `names`. Within a group, the copies keep their order.

    If both sides have only one device, the blocks are not inspected.
    """
    sinks = len(there.names)
    if len(here.names) * sinks == 1:
        return [DeviceBatch(here.names[0], there.names[0], blocks)]
    pair = here.of(blocks.src) * sinks + there.of(blocks.dst)
    groups = []
    for each in np.flatnonzero(np.bincount(pair, minlength=1)).tolist():
        mine = pair == each
        part = blocks if mine.all() else Blocks(blocks.src[mine], blocks.dst[mine], blocks.length[mine])
        groups.append(DeviceBatch(here.names[each // sinks], there.names[each % sinks], part))
    return groups

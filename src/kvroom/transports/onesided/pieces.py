"""Registered memory as pieces, for engines that address each registered piece separately: no block may cross a border.

Pieces are the registered ranges in the order of their addresses, each without the bytes that an earlier one covers, so
every registered byte is in exactly one piece. Both sides derive the same pieces from the same ranges. NumPy over
blocks, no Python loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import U64, Blocks, MemoryRange
from kvroom.transports.kit.ranges import u64

_END = np.array([2**64 - 1], np.uint64)


class Pieces:
    """The pieces of some ranges: `memory` is the list to register, `start` has their addresses, uint64[n]."""

    def __init__(self, memory: Iterable[MemoryRange]) -> None:
        self.memory: list[MemoryRange] = []
        covered = 0
        for piece in sorted(memory):
            start, stop = max(piece.address, covered), piece.address + piece.nbytes
            if start < stop:
                self.memory.append(MemoryRange(start, stop - start, piece.device))
                covered = stop
        self.start = u64(piece.address for piece in self.memory)

    def find(self, address: U64) -> npt.NDArray[np.intp]:
        """Return the index of the piece of each address: uint64[n] -> intp[n]. All must be inside the ranges."""
        return np.searchsorted(self.start, address, side="right") - 1

    def cut(self, blocks: Blocks, address: U64) -> Blocks:
        """Return the same copies, cut where `address` (the src or dst of the blocks) passes from piece to piece."""
        if self.start.size == 1:
            return blocks
        stop = address + blocks.length
        first = self.find(address)
        count = self.find(stop - np.uint64(1)) - first + 1
        if (count == 1).all():
            return blocks
        owner = np.repeat(np.arange(count.size), count)
        piece = first[owner] + np.arange(owner.size) - (np.cumsum(count) - count)[owner]
        low = np.maximum(address[owner], self.start[piece])
        high = np.minimum(stop[owner], np.append(self.start, _END)[piece + 1])
        offset = low - address[owner]
        return Blocks(blocks.src[owner] + offset, blocks.dst[owner] + offset, high - low)


def cut_at_borders(blocks: Blocks, here: Pieces, there: Pieces) -> Blocks:
    """Return the same copies as blocks that each stay inside one piece on both sides. No block may be empty."""
    blocks = here.cut(blocks, blocks.src)
    return there.cut(blocks, blocks.dst)


class PiecePair(NamedTuple):
    """Blocks that all go from piece `here` to piece `there`: their offsets in each piece and lengths, uint64[n]."""

    here: int
    there: int
    offset: U64
    peer_offset: U64
    length: U64


def by_pieces(blocks: Blocks, here: Pieces, there: Pieces) -> list[PiecePair]:
    """Return the same copies grouped by pairs of pieces, in their order within each pair. No block may be empty."""
    blocks = cut_at_borders(blocks, here, there)
    mine, theirs = here.find(blocks.src), there.find(blocks.dst)
    offset, peer_offset = blocks.src - here.start[mine], blocks.dst - there.start[theirs]
    pair = mine * there.start.size + theirs
    order = np.argsort(pair, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(pair[order])) + 1)
    return [
        PiecePair(
            here=int(mine[run[0]]),
            there=int(theirs[run[0]]),
            offset=offset[run],
            peer_offset=peer_offset[run],
            length=blocks.length[run],
        )
        for run in runs
    ]

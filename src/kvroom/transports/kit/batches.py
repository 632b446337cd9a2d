"""Preparation of blocks for a move: normalise, split into pieces, cut into batches. NumPy over blocks, no Python loop.

Pure: no sockets, no threads, no system calls.
"""

from __future__ import annotations

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks


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
    """Return the same copies, split where necessary, and runs [start, stop) within both limits."""
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

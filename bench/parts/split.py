"""Plans for two pools whose ranks hold different heads, as after a change of the tensor-parallel width.

Keys and values of 8 layers, 16 tokens a page, NHD; half of the pages of both pools are used, in random order. A *piece*
is the part of one token that both ranks have: all heads of the narrower rank, half the heads of the wider one.
"""

from __future__ import annotations

import numpy as np

from kvroom.plan import Blocks, KVLayout, Planner, array_regions

LAYERS, PAGE_TOKENS = 8, 16
WIDTHS = {"equal": (1, 1), "2->4": (2, 1), "4->2": (1, 2)}
"""The pieces of a token on the source and on the sink. "2->4": two source ranks to four sink ranks."""


def split(source: int, sink: int, nbytes: int, piece_bytes: int, widths: str) -> Blocks:
    """Return the blocks that copy `nbytes` between pools at these addresses, each four times as large."""
    pages = nbytes // (LAYERS * 2 * PAGE_TOKENS * piece_bytes)
    here, there = (
        _layout(base, 2 * pages, piece_bytes, width) for base, width in zip((source, sink), WIDTHS[widths], strict=True)
    )
    source_pages, sink_pages = (np.random.default_rng(seed).permutation(2 * pages)[:pages] for seed in (1, 2))
    return Planner(here, there).copies(source_pages, sink_pages, 0, pages * PAGE_TOKENS)


def _layout(base: int, pages: int, piece_bytes: int, width: int) -> KVLayout:
    shape = (LAYERS, 2, pages, PAGE_TOKENS, width, piece_bytes)
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return KVLayout(
        array_regions(base, shape, strides, "LCPTHD", itemsize=1, layers=range(LAYERS), first_head=0), dtype="uint8"
    )

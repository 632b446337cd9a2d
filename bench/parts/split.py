"""Plans of a pool pair whose ranks hold different heads: what a change of the tensor-parallel width does to blocks.

Keys and values of 8 layers, 16 tokens a page, NHD; half of the pages of both pools are used, in random order. A *piece*
is what both ranks share of one token: all heads of the narrower rank, half the heads of the wider one.
"""

from __future__ import annotations

import numpy as np

from kvroom.plan import Blocks, KVLayout, Planner, array_regions

LAYERS, PAGE_TOKENS = 8, 16
WIDTHS = {"equal": (1, 1), "2->4": (2, 1), "4->2": (1, 2)}
"""How many pieces a token takes on the source and on the sink. "2->4": two source ranks to four sink ranks."""


def split(source: int, sink: int, nbytes: int, piece_bytes: int, widths: str) -> Blocks:
    """Return what copies `nbytes` in all between pools at these addresses, of four times as many bytes."""
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

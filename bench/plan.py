"""Planning speed: how long it takes to turn page lists into blocks, and what share of the copy that is.

    python bench/plan.py

Prints medians. 80 layers x 4,096 pages of 16 tokens, 8 KV heads of 128 in bfloat16: 32 KiB a page, layer and component.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvroom.plan import Blocks, KVLayout, Planner, array_regions

PAGES = 4096
COPY_BYTES_PER_S = 10e9
"""What a fast copy of 32 KiB blocks reaches on one machine, for the share of planning in a hand-off."""


def layout(axes: str, page_tokens: int, layers: int = 80, heads: tuple[int, int] = (0, 8)) -> KVLayout:
    """A dense pool of twice the pages that are planned, at an address that is never read."""
    pages = 2 * PAGES * 16 // page_tokens
    sizes = {"L": layers, "C": 2, "P": pages, "T": page_tokens, "H": heads[1] - heads[0], "D": 128}
    shape = [sizes[axis] for axis in axes]
    strides = [2 * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return KVLayout(
        array_regions(1 << 40, shape, strides, axes, itemsize=2, layers=range(layers), first_head=heads[0]),
        dtype="bfloat16",
    )


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Median duration of a call, after one that does not count."""
    call()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def bulk(name: str, source: KVLayout, target: KVLayout, pages: int) -> None:
    """Plan one long request whose pages lie scattered in both pools."""
    tokens = pages * 16
    rng = np.random.default_rng(0)
    source_pages = rng.permutation(source.pages)[: source.window_pages(0, tokens)]
    target_pages = rng.permutation(target.pages)[: target.window_pages(0, tokens)]
    planner = Planner(source, target)

    def plan() -> Blocks:
        return planner.copies(source_pages, target_pages, 0, tokens)

    blocks = plan()
    count, nbytes = len(blocks.src), blocks.nbytes
    del blocks
    taken_s = median_s(plan, 7)
    share = taken_s / (nbytes / COPY_BYTES_PER_S)
    print(
        f"{name:42} {pages:5} pages {count:9,} blocks of {nbytes // count:6,} B: {taken_s * 1e3:7.2f} ms, "
        f"{count / taken_s / 1e6:6.1f} M blocks/s, {share:6.2%} of a copy at {COPY_BYTES_PER_S / 1e9:.0f} GB/s"
    )


def small() -> None:
    """The fixed cost of a call: a room of one page, 30 layers."""
    pool = layout("LCPTHD", 16, layers=30, heads=(0, 3))
    planner = Planner(pool, pool)
    copies_us = median_s(lambda: planner.copies([3], [5], 0, 16), 2000) * 1e6
    extents_us = median_s(lambda: planner.extents([5], 0, 16), 2000) * 1e6
    planner_us = median_s(lambda: Planner(pool, pool), 200) * 1e6
    print(f"one page, 30 layers: copies {copies_us:.0f} us, extents {extents_us:.0f} us, Planner {planner_us:.0f} us")


def main() -> None:
    """Run all."""
    small()
    equal = layout("LCPTHD", 16)
    bulk("equal", equal, equal, PAGES)
    bulk("equal, K and V of a page together", layout("LPCTHD", 16), layout("LPCTHD", 16), PAGES)
    bulk("pages of 48 to pages of 32", layout("LCPTHD", 48), layout("LCPTHD", 32), PAGES)
    bulk("pages of 64 to pages of 16", layout("LCPTHD", 64), equal, PAGES)
    bulk("heads split (TP 1 to 2), token-major", equal, layout("LCPTHD", 16, heads=(0, 4)), PAGES // 8)
    bulk("token-major to head-major", equal, layout("LCPHTD", 16), PAGES // 32)


if __name__ == "__main__":
    main()

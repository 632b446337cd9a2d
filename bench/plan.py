"""Planning: the time from page lists to blocks, its share of the copy, and the memory per block.

    python bench/plan.py [--copy-gb-per-s 10]

80 layers x 4,096 pages of 16 tokens, 8 KV heads of 128 in bfloat16: 32 KiB a page, layer and component. Times are
processor times, the median and the fastest of some calls: planning runs in one thread, so that the load of the machine
does not count. "B a block" is the memory of the result per block and, in brackets, the peak of a call. The goal: with
blocks of 32 KiB, planning takes less than 5 % of a copy at the given rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from kvroom.plan import Blocks, KVLayout, Planner, TokenSplit, array_regions, shares

PAGES = 4096
COPY_GB_PER_S = 10.0
"""The rate of a fast copy of 32 KiB blocks within one machine, for the share of planning in a hand-off."""
GOAL = 0.05


def layout(axes: str, page_tokens: int, layers: int = 80, heads: tuple[int, int] = (0, 8)) -> KVLayout:
    """Return the layout of a dense pool with twice the planned pages, at an address that is never read."""
    pages = 2 * PAGES * 16 // page_tokens
    sizes = {"L": layers, "C": 2, "P": pages, "T": page_tokens, "H": heads[1] - heads[0], "D": 128}
    shape = [sizes[axis] for axis in axes]
    strides = [2 * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    return KVLayout(
        array_regions(1 << 40, shape, strides, axes, itemsize=2, layers=range(layers), first_head=heads[0]),
        dtype="bfloat16",
    )


def times_s(call: Callable[[], object], repeats: int) -> list[float]:
    """Return the sorted processor times of some calls, after one call that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        begin = time.thread_time()
        call()
        taken.append(time.thread_time() - begin)
    return sorted(taken)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory of a call, including its result."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bulk(
    name: str, source: KVLayout, target: KVLayout, pages: int, gb_per_s: float, *, ragged: int = 0, repeats: int = 7
) -> float:
    """Plan one long request whose pages lie scattered in both pools. Return the share of planning in the copy."""
    tokens = pages * 16 - ragged
    rng = np.random.default_rng(0)
    source_pages = rng.permutation(source.pages)[: source.window_pages(0, tokens)]
    target_pages = rng.permutation(target.pages)[: target.window_pages(0, tokens)]
    planner = Planner(source, target)

    def plan() -> Blocks:
        return planner.copies(source_pages, target_pages, 0, tokens)

    blocks = plan()
    count, nbytes, kept = len(blocks.src), blocks.nbytes, sum(column.nbytes for column in blocks)
    del blocks
    taken = times_s(plan, repeats)
    median = statistics.median(taken)
    share = median / (nbytes / (gb_per_s * 1e9))
    print(
        f"{name:38} {pages:5} pages {count:11,} blocks of {nbytes // count:6,} B: {median * 1e3:7.2f} ms "
        f"(fastest {taken[0] * 1e3:6.2f}), {count / median / 1e6:6.1f} M blocks/s, {share:6.2%} of the copy, "
        f"{kept / count:.0f} B a block ({peak_bytes(plan) / count:.0f})"
    )
    return share


def small() -> None:
    """Print the fixed cost of a call, for a room of one page and 30 layers."""
    pool = layout("LCPTHD", 16, layers=30, heads=(0, 3))
    planner = Planner(pool, pool)
    copies_us = statistics.median(times_s(lambda: planner.copies([3], [5], 0, 16), 2000)) * 1e6
    extents_us = statistics.median(times_s(lambda: planner.extents([5], 0, 16), 2000)) * 1e6
    first_us = statistics.median(times_s(lambda: Planner(pool, pool).copies([3], [5], 0, 16), 200)) * 1e6
    shares_us = statistics.median(times_s(lambda: shares([pool], pool), 200)) * 1e6
    print(
        f"one page, 30 layers: copies {copies_us:.1f} us, extents {extents_us:.1f} us; "
        f"once for a pair of ranks: Planner and its first plan {first_us:.0f} us, shares {shares_us:.0f} us"
    )


def dealt(rank: int, size: int) -> KVLayout:
    """Return the layout of a rank with every `size`-th run of tokens, each as long as a page."""
    whole = layout("LCPTHD", 16)
    return KVLayout(whole.regions, whole.dtype, split=TokenSplit(rank=rank, size=size, interleave=16))


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copy-gb-per-s", type=float, default=COPY_GB_PER_S, help="the fastest transport's rate")
    rate = parser.parse_args().copy_gb_per_s
    small()
    print(f"share of a copy at {rate:g} GB/s:")
    equal = layout("LCPTHD", 16)
    share = bulk("equal", equal, equal, PAGES, rate)
    bulk("equal, a last page not full", equal, equal, PAGES, rate, ragged=5)
    bulk("equal, K and V of a page together", layout("LPCTHD", 16), layout("LPCTHD", 16), PAGES, rate)
    bulk("pages of 48 to pages of 32", layout("LCPTHD", 48), layout("LCPTHD", 32), PAGES, rate)
    bulk("pages of 64 to pages of 16", layout("LCPTHD", 64), equal, PAGES, rate)
    bulk("tokens dealt to 2 ranks, to one", dealt(1, 2), equal, PAGES, rate)
    halves, quarters = layout("LCPTHD", 16, heads=(0, 4)), layout("LCPTHD", 16, heads=(0, 2))
    bulk("TP 2 to 4, token-major", halves, quarters, PAGES, rate, repeats=3)
    bulk("TP 2 to 4, token-major, last not full", halves, quarters, PAGES // 8, rate, ragged=5)
    head_major = layout("LCPHTD", 16, heads=(0, 4)), layout("LCPHTD", 16, heads=(0, 2))
    bulk("TP 2 to 4, head-major", *head_major, PAGES, rate)
    bulk("token-major to head-major", equal, layout("LCPHTD", 16), PAGES // 32, rate)
    print(f"equal: {share:.2%} of the copy, goal below {GOAL:.0%}: {'met' if share < GOAL else 'NOT met'}")


if __name__ == "__main__":
    main()

"""The expected result of a plan, found slowly and obviously: element by element, byte by byte.

The oracle shares no code with `kvroom.plan`: of a layout it reads only the declared numbers. It finds the tokens of a
rank by testing each token, the place of a token by counting the ones before it, and an address by the formula of
`KVRegion`. It is meant for layouts of a few thousand bytes at low addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import Blocks, Extents
from kvroom.plan.layout import KVLayout, KVRegion

Memory = npt.NDArray[np.int64]


def held(layout: KVLayout, group: str, stop: int) -> list[int]:
    """Return the tokens of [0, stop) that the rank holds, in order."""
    window = {g.name: g.window for g in layout.groups}.get(group, 0)
    split = layout.split
    if split is None or split.interleave == 0 or window > 0:
        return list(range(stop))
    return [token for token in range(stop) if token // split.interleave % split.size == split.rank]


def kept_from(layout: KVLayout, group: str, stop: int) -> int:
    """Return the first token that a group keeps of a request of `stop` tokens."""
    window = {g.name: g.window for g in layout.groups}.get(group, 0)
    spans = [r.span for r in layout.regions if r.group == group]
    first = max(0, stop - window) if window else 0
    while any(first % span for span in spans):
        first -= 1
    return first


def page_numbers(layout: KVLayout, group: str, start: int, stop: int) -> list[int]:
    """Return the pages of the request, counted from its first, that hold the rank's tokens of [start, stop)."""
    size = next((r.page_tokens for r in layout.regions if r.group == group), 0)
    if not size:
        return []
    places = [place for place, token in enumerate(held(layout, group, stop)) if token >= start]
    return sorted({place // size for place in places})


def elements(layout: KVLayout, pages: Sequence[int], list_start: int, token: int) -> dict[tuple[int, str, int], range]:
    """Return the addresses of one token: (layer, component, head of the model) -> the range of its bytes.

    `pages[0]` is the page that holds token `list_start`. Only for a layout without groups, spans and splits.
    """
    page = pages[token // layout.page_tokens - list_start // layout.page_tokens]
    found = {}
    for r in layout.regions:
        for local, head in enumerate(range(*r.head_range)):
            at = r.base + page * r.page_stride + token % r.page_tokens * r.token_stride + local * r.head_stride
            found[r.layer, r.component, head] = range(at, at + r.head_bytes)
    return found


class Names:
    """A number for every byte of every element of a model, the same on each rank that holds the element.

    Names are from 1 to `LIMIT`: at most 16 components, tokens below 64, heads below 16, elements of up to 8 bytes.
    """

    LIMIT = 17 * 64 * 16 * 8

    def __init__(self) -> None:
        self._keys: dict[tuple[int, str], int] = {}

    def of(self, region: KVRegion, tokens: Memory) -> Memory:
        """Return the names of a region's bytes for these tokens: int64[tokens, heads, head_bytes]."""
        key = self._keys.setdefault((region.layer, region.component), len(self._keys) + 1)
        assert key <= 16
        heads = np.arange(*region.head_range)[:, None]
        return ((key * 64 + tokens[:, None, None]) * 16 + heads) * 8 + np.arange(region.head_bytes)

    def among(self, memory: Memory) -> npt.NDArray[np.bool_]:
        """Return which names occur in a memory, as bool[LIMIT]; 0, which names no byte, never does."""
        found = np.zeros(self.LIMIT, np.bool_)
        found[memory] = True
        found[0] = False
        return found


def blank(layout: KVLayout) -> Memory:
    """Return all memory up to the end of the last region, with every byte 0, which means that it holds no element."""
    return np.zeros(max(r.base + r.extent for r in layout.regions), np.int64)


def fill(
    memory: Memory,
    names: Names,
    layout: KVLayout,
    pages: Sequence[int],
    list_start: int,
    window: tuple[int, int],
    group: str = "",
) -> None:
    """Write the name of every byte that holds a token of the window into memory."""
    start, stop = window
    tokens = held(layout, group, stop)
    before = sum(token < list_start for token in tokens)
    numbers = np.array([*pages, 0])  # a list may be empty
    for r in layout.regions:
        if r.group != group:
            continue
        firsts = [(place, t) for place, t in enumerate(tokens) if t >= start and t % r.span == 0]
        place, token = np.array(firsts, np.int64).reshape(-1, 2).T
        page = numbers[place // r.page_tokens - before // r.page_tokens]
        element = r.base + page * r.page_stride + place % r.page_tokens // r.span * r.token_stride
        heads = np.arange(r.heads)[:, None] * r.head_stride
        memory[element[:, None, None] + heads + np.arange(r.head_bytes)] = names.of(r, token)


def apply(blocks: Blocks, source: Memory, target: Memory, writes: Memory) -> None:
    """Copy the blocks, and add 1 to `writes` for each byte of the target that is written."""
    for src, dst, length in zip(*(column.tolist() for column in blocks), strict=True):
        assert length > 0, f"the block from {src} to {dst} is empty"
        assert src + length <= source.size, f"{length} bytes at {src} reach beyond the source's memory"
        assert dst + length <= target.size, f"{length} bytes at {dst} reach beyond the target's memory"
        target[dst : dst + length] = source[src : src + length]
        writes[dst : dst + length] += 1


def expected_bytes(
    source: KVLayout,
    target: KVLayout,
    source_pages: Sequence[int],
    target_pages: Sequence[int],
    start: int,
    stop: int,
    *,
    source_start: int | None = None,
    target_start: int | None = None,
) -> dict[int, int]:
    """Return target byte -> source byte, for every byte that the copy of tokens [start, stop) must write."""
    expected: dict[int, int] = {}
    for token in range(start, stop):
        from_ = elements(source, source_pages, start if source_start is None else source_start, token)
        to = elements(target, target_pages, start if target_start is None else target_start, token)
        for key in from_.keys() & to.keys():
            expected.update(zip(to[key], from_[key], strict=True))
    return expected


def moved_bytes(blocks: Blocks) -> dict[int, int]:
    """Return target byte -> source byte for these blocks. Raise `AssertionError` if a byte is written twice."""
    moved: dict[int, int] = {}
    for src, dst, length in zip(*(column.tolist() for column in blocks), strict=True):
        for i in range(length):
            assert dst + i not in moved, f"byte {dst + i} is written from {moved[dst + i]} and again from {src + i}"
            moved[dst + i] = src + i
    return moved


def joinable(blocks: Blocks) -> list[tuple[int, int]]:
    """Return the pairs (i, j) where block j begins where block i ends, on both sides; none if blocks are maximal."""
    begins = {(src, dst): j for j, (src, dst) in enumerate(zip(blocks.src.tolist(), blocks.dst.tolist(), strict=True))}
    ends = [(s + n, d + n) for s, d, n in zip(*(column.tolist() for column in blocks), strict=True)]
    return [(i, begins[end]) for i, end in enumerate(ends) if end in begins]


def union(begins: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the bytes of these ranges as sorted (address, length) that neither overlap nor touch."""
    every = sorted({at for begin, length in zip(begins, lengths, strict=True) for at in range(begin, begin + length)})
    ranges: list[tuple[int, int]] = []
    for at in every:
        if ranges and sum(ranges[-1]) == at:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((at, 1))
    return ranges


def as_ranges(extents: Extents) -> list[tuple[int, int]]:
    """Return extents as a list of (address, length), as plain ints."""
    return list(zip(extents.address.tolist(), extents.length.tolist(), strict=True))

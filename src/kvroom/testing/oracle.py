"""The slow, obvious answer to what a plan must do: element by element, byte by byte, in plain Python.

It shares no code with `kvroom.plan.copies`: it walks tokens, layers and heads and asks the address formula of
`KVRegion` for each. Meant for layouts of a few thousand bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvroom.plan.blocks import Blocks, Extents
from kvroom.plan.layout import KVLayout


def elements(layout: KVLayout, pages: Sequence[int], list_start: int, token: int) -> dict[tuple[int, str, int], range]:
    """Where one token of a request lies: (layer, component, head of the model) -> the addresses of its bytes.

    `pages[0]` is the page that holds token `list_start`.
    """
    page = pages[token // layout.page_tokens - list_start // layout.page_tokens]
    found = {}
    for r in layout.regions:
        for local, head in enumerate(range(*r.head_range)):
            at = r.base + page * r.page_stride + token % r.page_tokens * r.token_stride + local * r.head_stride
            found[r.layer, r.component, head] = range(at, at + r.head_bytes)
    return found


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
    """Target byte -> source byte, for every byte that the copy of tokens [start, stop) must write."""
    expected: dict[int, int] = {}
    for token in range(start, stop):
        from_ = elements(source, source_pages, start if source_start is None else source_start, token)
        to = elements(target, target_pages, start if target_start is None else target_start, token)
        for key in from_.keys() & to.keys():
            expected.update(zip(to[key], from_[key], strict=True))
    return expected


def moved_bytes(blocks: Blocks) -> dict[int, int]:
    """Target byte -> source byte, as the blocks say. `AssertionError` if a byte is written twice."""
    moved: dict[int, int] = {}
    for src, dst, length in zip(*(column.tolist() for column in blocks), strict=True):
        for i in range(length):
            assert dst + i not in moved, f"byte {dst + i} is written from {moved[dst + i]} and again from {src + i}"
            moved[dst + i] = src + i
    return moved


def joinable(blocks: Blocks) -> list[tuple[int, int]]:
    """Pairs of blocks (i, j) where j begins where i ends, on both sides: empty if the blocks are maximal."""
    begins = {(src, dst): j for j, (src, dst) in enumerate(zip(blocks.src.tolist(), blocks.dst.tolist(), strict=True))}
    ends = [(s + n, d + n) for s, d, n in zip(*(column.tolist() for column in blocks), strict=True)]
    return [(i, begins[end]) for i, end in enumerate(ends) if end in begins]


def union(begins: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The bytes of these ranges as sorted, disjoint, not adjacent (address, length)."""
    every = sorted({at for begin, length in zip(begins, lengths, strict=True) for at in range(begin, begin + length)})
    ranges: list[tuple[int, int]] = []
    for at in every:
        if ranges and sum(ranges[-1]) == at:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((at, 1))
    return ranges


def as_ranges(extents: Extents) -> list[tuple[int, int]]:
    """Extents as (address, length) of plain ints."""
    return list(zip(extents.address.tolist(), extents.length.tolist(), strict=True))

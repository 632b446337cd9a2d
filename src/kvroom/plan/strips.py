"""The bytes that two layouts share, in an order that depends on neither: what a checksum is taken over.

The law: for one pair of layouts, both sides list the same bytes in the same order, whatever their strides, page sizes
and page numbers are. The order is by layer, component and first shared head; within a strip by token, head and byte.
"""

from __future__ import annotations

from typing import NamedTuple

from kvroom.plan.copies import shared_regions
from kvroom.plan.layout import KVLayout, KVRegion


class Strip(NamedTuple):
    """Some heads of one layer's component on one side: element (page, token, head) is `head_bytes` bytes at

        base + page * page_stride + token * token_stride + head * head_stride

    All strides are in bytes; `base` is the address of the first shared head.
    """

    base: int
    pages: int
    page_stride: int
    page_tokens: int
    token_stride: int
    heads: int
    head_stride: int
    head_bytes: int


def strips(source: KVLayout, target: KVLayout) -> tuple[tuple[Strip, ...], tuple[Strip, ...]]:
    """The shared strips, in the same order: first the source's, then the target's. `PlanError` as from `copies`."""
    pairs = [(_shared_heads(s, t), s, t) for s, t in shared_regions(source, target)]
    pairs.sort(key=lambda pair: (pair[1].layer, pair[1].component, pair[0]))
    return (
        tuple(_strip(region, heads) for heads, region, _ in pairs),
        tuple(_strip(region, heads) for heads, _, region in pairs),
    )


def _shared_heads(s: KVRegion, t: KVRegion) -> tuple[int, int]:
    return max(s.head_range[0], t.head_range[0]), min(s.head_range[1], t.head_range[1])


def _strip(region: KVRegion, heads: tuple[int, int]) -> Strip:
    lo, hi = heads
    return Strip(
        base=region.base + (lo - region.head_range[0]) * region.head_stride,
        pages=region.pages,
        page_stride=region.page_stride,
        page_tokens=region.page_tokens,
        token_stride=region.token_stride,
        heads=hi - lo,
        head_stride=region.head_stride,
        head_bytes=region.head_bytes,
    )

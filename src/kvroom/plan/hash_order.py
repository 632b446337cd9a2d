"""The bytes that two layouts share, in an order that depends on neither: the input of a checksum.

The law: for one pair of layouts, both sides list the same bytes in the same order, whatever their strides, page sizes
and page numbers are. The order is by layer, component and first shared head; within a strip by token, head and byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .intersection import Part, Shared, shared_heads
from .layout import KVLayout, KVRegion


class Strip(NamedTuple):
    """Some heads of one layer's component on one side: element (page, element, head) is `head_bytes` bytes at

        base + page * page_stride + element * token_stride + head * head_stride

    All strides are in bytes; `base` is the address of the first shared head. An element covers `span` tokens, so a
    page holds `page_tokens // span` of them. `group` names the page table. Where tokens interleave on a side, the
    checksum covers the tokens that both sides hold; `KVLayout.table(group)` returns their places.
    """

    base: int
    pages: int
    page_stride: int
    page_tokens: int
    token_stride: int
    heads: int
    head_stride: int
    head_bytes: int
    group: str = ""
    span: int = 1


def strips(
    source: KVLayout, target: KVLayout, parts: Sequence[Part] | None = None
) -> tuple[tuple[Strip, ...], tuple[Strip, ...]]:
    """Return the strips that two layouts share: the source's and the target's, in the same order.

    `parts` limits them to these parts. Raises `PlanError` as `copies` does.
    """
    shared = shared_heads(source, target, parts)
    shared.sort(key=lambda one: (one.target.layer, one.target.component, one.lo))
    return (
        tuple(_strip(one.source, one) for one in shared),
        tuple(_strip(one.target, one) for one in shared),
    )


def _strip(region: KVRegion, one: Shared) -> Strip:
    return Strip(
        base=region.base + (one.lo - region.head_range[0]) * region.head_stride,
        pages=region.pages,
        page_stride=region.page_stride,
        page_tokens=region.page_tokens,
        token_stride=region.token_stride,
        heads=one.hi - one.lo,
        head_stride=region.head_stride,
        head_bytes=region.head_bytes,
        group=region.group,
        span=region.span,
    )

"""The order of a checksum: both sides of any pair of layouts list the same elements, in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvroom.errors import PlanError
from kvroom.plan import KVLayout, Strip, array_regions, strips
from kvroom_lab.oracle import elements

TOKENS = 10
PAGES = {4: [5, 0, 3], 16: [2], 5: [1, 4]}


def pool(axes: str, *, page_tokens: int, layers: Sequence[int] = (0, 1), heads: tuple[int, int] = (0, 4)) -> KVLayout:
    """A pool of 6 pages whose axes lie in memory in this order, elements of 8 bytes."""
    sizes = {"L": len(layers), "C": 2, "P": 6, "T": page_tokens, "H": heads[1] - heads[0], "D": 8}
    strides, step = {}, 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= sizes[axis]
    shape, steps = [sizes[axis] for axis in axes], [strides[axis] for axis in axes]
    regions = array_regions(4096, shape, steps, axes, itemsize=1, layers=layers, first_head=heads[0])
    return KVLayout(regions, dtype="int8")


def addresses(one: Strip, pages: Sequence[int], tokens: int) -> list[range]:
    """Element by element, in the order of the law."""
    return [
        range(at, at + one.head_bytes)
        for token in range(tokens)
        for head in range(one.heads)
        for at in [
            one.base
            + pages[token // one.page_tokens] * one.page_stride
            + token % one.page_tokens * one.token_stride
            + head * one.head_stride
        ]
    ]


def named(layout: KVLayout, page_list: Sequence[int]) -> dict[range, tuple[int, int, str, int]]:
    """Return the element at each address, according to the oracle."""
    return {
        where: (token, *key)
        for token in range(TOKENS)
        for key, where in elements(layout, page_list, 0, token).items()
    }  # fmt: skip


SIDES = [
    (pool("LCPTHD", page_tokens=4), pool("LCPTHD", page_tokens=4)),
    (pool("LCPTHD", page_tokens=4), pool("PLHTCD", page_tokens=16)),
    (pool("CLPHTD", page_tokens=5), pool("LPTCHD", page_tokens=4)),
    (pool("LCPTHD", page_tokens=4, heads=(2, 6)), pool("LCPHTD", page_tokens=16, heads=(0, 4))),
    (pool("LCPTHD", page_tokens=16, layers=(1, 2)), pool("LCPTHD", page_tokens=5, layers=(0, 1))),
]


@pytest.mark.parametrize(("source", "target"), SIDES)
def test_both_sides_list_the_same_elements_in_the_same_order(source: KVLayout, target: KVLayout) -> None:
    listed = []
    for layout, side in zip((source, target), strips(source, target), strict=True):
        page_list = PAGES[layout.page_tokens]
        names = named(layout, page_list)
        listed.append([names[at] for one in side for at in addresses(one, page_list, TOKENS)])
    assert listed[0] == listed[1]
    strip = [(layer, component) for _, layer, component, _ in listed[0]]
    heads = {key: [head for token, *of, head in listed[0] if token == 0 and tuple(of) == key] for key in strip}
    assert strip == sorted(strip)
    assert all(some == sorted(some) for some in heads.values())
    shared = set(named(source, PAGES[source.page_tokens]).values()) & set(
        named(target, PAGES[target.page_tokens]).values()
    )
    assert len(listed[0]) == len(shared)
    assert set(listed[0]) == shared


def test_layouts_that_share_no_bytes_are_refused_as_by_a_plan() -> None:
    other = KVLayout(pool("LCPTHD", page_tokens=4).regions, dtype="int16")
    with pytest.raises(PlanError, match="int16"):
        strips(pool("LCPTHD", page_tokens=4), other)

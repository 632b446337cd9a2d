"""Dense pools of a few pages, and what a plan says of them as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvroom.plan import Blocks, KVLayout, KVRegion, array_regions


def dense(
    base: int, axes: str, sizes: dict[str, int], padding: Sequence[int], **keywords: Any
) -> tuple[tuple[KVRegion, ...], int]:
    """Regions of an array at `base` with these axes, each stride padded, and the address where it ends."""
    strides = [1]
    for axis, pad in zip(axes[::-1], padding, strict=True):
        strides.insert(0, strides[0] * sizes[axis] + pad)
    shape = [sizes[axis] for axis in axes]
    return array_regions(base, shape, strides[1:], axes, itemsize=1, **keywords), base + strides[0]


def pool(axes: str = "LCPTHD", base: int = 0, **sizes: int) -> KVLayout:
    """2 layers of K and V, 8 pages of 4 tokens, 3 heads of 8 bytes."""
    named = {"L": 2, "C": 2, "P": 8, "T": 4, "H": 3, "D": 8} | sizes
    regions, _ = dense(base, axes, named, [0] * len(axes), layers=range(named["L"]))
    return KVLayout(regions, "int8")


def rows(blocks: Blocks) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in blocks), strict=True))


def shard(layers: Sequence[int] = (0, 1), heads: tuple[int, int] = (0, 4), base: int = 0, **changes: Any) -> KVLayout:
    """K and V of some layers and heads of a model."""
    sizes = {"L": len(layers), "C": 2, "P": 4, "T": 4, "H": heads[1] - heads[0], "D": changes.pop("D", 8)}
    named: dict[str, Any] = {"layers": layers, "first_head": heads[0]}
    components = changes.pop("components", ("k", "v"))
    regions, _ = dense(base, "LCPTHD", sizes, [0] * 6, components=components, **named)
    return KVLayout(regions, changes.pop("dtype", "int8"), changes.pop("model", ""), split=changes.pop("split", None))

"""The intersection of two layouts: shared heads of a layer and component, as pairs of regions.

The law: bytes are shared only if they have the same meaning on both sides. A dtype, model, head size, span, format,
group or window that differs raises a `PlanError` that names both values. Bytes that only one side holds are not shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import msgspec

from kvroom.errors import PlanError

from .layout import KVLayout, KVRegion


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Heads [lo, hi) of the model in each of the regions [first, last) of a target's `regions`."""

    first: int
    last: int
    lo: int
    hi: int


class Shared(NamedTuple):
    """Heads [lo, hi) that region number `number` of the target shares with a region of the source."""

    source: KVRegion
    target: KVRegion
    number: int
    lo: int
    hi: int


def shared_heads(source: KVLayout, target: KVLayout, parts: Sequence[Part] | None = None) -> list[Shared]:
    """Return all heads that two layouts share, or those of `parts`, in the order of the target's regions.

    Raises `PlanError` if bytes that both hold differ in kind, or if the parts name more than is shared.
    """
    if (source.dtype, source.model) != (target.dtype, target.model):
        raise PlanError(
            f"source has dtype {source.dtype!r} and model {source.model!r}, target has dtype {target.dtype!r} and "
            f"model {target.model!r}; start both sides with the same model and cache dtype"
        )
    by_key: dict[tuple[int, str], list[KVRegion]] = {}
    for region in source.regions:
        by_key.setdefault((region.layer, region.component), []).append(region)
    shared = []
    for index, t in enumerate(target.regions):
        for s in by_key.get((t.layer, t.component), ()):
            lo, hi = t.head_range
            if s.head_range != t.head_range:
                lo, hi = max(lo, s.head_range[0]), min(hi, s.head_range[1])
            _check_alike(s, t, lo < hi)
            if lo < hi:
                shared.append(Shared(s, t, index, lo, hi))
    for name in sorted(source.tables.keys() & target.tables.keys()):
        ours, theirs = source.tables[name].window, target.tables[name].window
        if ours != theirs:
            raise PlanError(
                f"source group {name!r} has a window of {ours} tokens, target group {name!r} has {theirs} "
                f"(0: no window); start both sides with the same model and the same windows"
            )
    return shared if parts is None else _chosen(shared, target, parts)


def summary(layout: KVLayout) -> str:
    """Return the layers, components and heads of a layout, for error messages."""
    layers = [r.layer for r in layout.regions]
    components = sorted({r.component for r in layout.regions})
    heads = sorted({r.head_range for r in layout.regions})
    return f"layers {min(layers)} to {max(layers)}, components {components}, heads {[list(h) for h in heads]}"


def _check_alike(s: KVRegion, t: KVRegion, meet: bool) -> None:
    """Raise `PlanError` for regions of one layer and component whose bytes differ in kind."""
    if (s.head_bytes, s.span, s.group, s.format) != (t.head_bytes, t.span, t.group, t.format):
        mine, yours = next(pair for pair in zip(_kinds(s), _kinds(t), strict=True) if pair[0] != pair[1])
        raise PlanError(
            f"source {s.name} has {mine}, target {t.name} has {yours}; "
            f"start both sides with the same model and cache dtype"
        )
    if t.format and meet and s.head_range != t.head_range:
        raise PlanError(
            f"source {s.name} and target {t.name} have the opaque format {t.format!r}, which cannot be cut; "
            f"give both sides the same heads"
        )


def _kinds(r: KVRegion) -> tuple[str, str, str, str]:
    return (
        f"{r.head_bytes} bytes a head",
        f"elements of {r.span} tokens",
        f"page table {r.group!r}",
        f"format {r.format!r}",
    )


def _chosen(shared: list[Shared], target: KVLayout, parts: Sequence[Part]) -> list[Shared]:
    by_index: dict[int, list[Shared]] = {}
    for one in shared:
        by_index.setdefault(one.number, []).append(one)
    chosen: dict[int, list[Shared]] = {}
    for part in parts:
        if not 0 <= part.first < part.last <= len(target.regions) or part.lo >= part.hi:
            raise PlanError(
                f"{part} names no heads of the target's {len(target.regions)} regions; give half-open ranges"
            )
    if sum(part.last - part.first for part in parts) > sum(region.heads for region in target.regions):
        raise PlanError(f"{len(parts)} parts name more than the target's heads; name each head once")
    for part in parts:
        for index in range(part.first, part.last):
            chosen.setdefault(index, []).extend(_cut(by_index.get(index, []), target.regions[index], part))
    ordered = [sorted(chosen[index], key=lambda one: one.lo) for index in sorted(chosen)]
    for one, other in chain.from_iterable(map(pairwise, ordered)):
        if other.lo < one.hi:
            raise PlanError(f"head {other.lo} of target {one.target.name} is named by two parts; name it once")
    return list(chain.from_iterable(ordered))


def _cut(shared: list[Shared], region: KVRegion, part: Part) -> list[Shared]:
    """Return the shared heads of one region that a part names: all must be shared, and an opaque region whole."""
    cut = [one._replace(lo=max(one.lo, part.lo), hi=min(one.hi, part.hi)) for one in shared]
    cut = [one for one in cut if one.lo < one.hi]
    if sum(one.hi - one.lo for one in cut) != part.hi - part.lo:
        raise PlanError(
            f"heads [{part.lo}, {part.hi}) of target {region.name} are to be written, "
            f"but source and target share only {[[one.lo, one.hi] for one in shared]} of them"
        )
    if region.format and (part.lo, part.hi) != region.head_range:
        raise PlanError(
            f"heads [{part.lo}, {part.hi}) of target {region.name} are to be written, "
            f"whose opaque format {region.format!r} cannot be cut; name all its heads"
        )
    return cut

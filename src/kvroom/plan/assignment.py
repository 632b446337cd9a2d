"""Who writes what, when several sources feed one target.

The law: every head of every region of the target, for every token, is written by exactly one source. Where several
hold the same (replicated KV heads, MLA, a state kept on each rank), the first in the list writes. What nobody holds is
a `PlanError` that names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from kvroom.errors import PlanError

from .intersection import Part, Shared, shared_heads
from .layout import KVLayout, KVRegion
from .tokens import TokenSplit

_WHOLE = TokenSplit(rank=0, size=1)


class _Holder(NamedTuple):
    """Source number `source` holds heads [lo, hi) of a region of the target, for the tokens of `split`."""

    source: int
    lo: int
    hi: int
    split: TokenSplit


def shares(sources: Sequence[KVLayout], target: KVLayout) -> tuple[tuple[Part, ...] | None, ...]:
    """What each source writes: None for all that it shares with the target, () for nothing, else the parts.

    Sources that split the tokens of a request in the same way (equal `size` and `interleave`) are siblings: one of
    each rank that holds tokens of the target hold a head together, once. Siblings that are not complete write nothing
    of that head. Raises `PlanError`: for layer, component, head and tokens that no source holds, and for what cannot
    be copied.
    """
    shared = [shared_heads(source, target) for source in sources]
    holders: list[list[_Holder]] = [[] for _ in target.regions]
    for number, (source, some) in enumerate(zip(sources, shared, strict=True)):
        for one in some:
            holders[one.number].append(_Holder(number, one.lo, one.hi, _split(source, one.target)))
    written: list[_Heads] = [{} for _ in sources]
    known: dict[tuple[object, ...], list[_Holder]] = {}  # regions that are held alike are written alike
    for index, region in enumerate(target.regions):
        split = _split(target, region)
        key = (region.head_range, split, *holders[index])
        if key not in known:
            known[key] = _writers(region, split, holders[index], len(sources))
        for writer in known[key]:
            _add(written[writer.source], index, writer.lo, writer.hi)
    return tuple(_parts(heads, some) for heads, some in zip(written, shared, strict=True))


_Heads = dict[int, list[tuple[int, int]]]  # number of a region: ranges of heads, in order, that do not touch


def _split(layout: KVLayout, region: KVRegion) -> TokenSplit:
    """Which tokens of this region the rank keeps.

    What has a window is whole on every rank if tokens interleave, else with the rank that says so when it sends.
    """
    split = layout.split
    return _WHOLE if split is None or (split.interleave and layout.tables[region.group].window) else split


def _writers(region: KVRegion, split: TokenSplit, holders: list[_Holder], sources: int) -> list[_Holder]:
    """Of those that hold heads of a region, the ones that write, with the heads that each writes, in their order."""
    borders = {*region.head_range, *(h.lo for h in holders), *(h.hi for h in holders)}
    found = []
    for lo, hi in pairwise(sorted(borders)):
        families: dict[tuple[int, int], dict[int, _Holder]] = {}
        for h in holders:
            if h.lo <= lo < h.hi:
                families.setdefault((h.split.size, h.split.interleave), {}).setdefault(h.split.rank, h)
        missing = []  # of each family the first sibling that is not there although it holds tokens of the target
        for (size, interleave), members in families.items():
            absent = (rank for rank in range(size) if rank not in members)
            siblings = (TokenSplit(rank=rank, size=size, interleave=interleave) for rank in absent)
            missing.append(next((one for one in siblings if one.meets(split)), None))
        complete = next((m for m, lacks in zip(families.values(), missing, strict=True) if lacks is None), None)
        if complete is None:
            tokens = f" for the tokens of {missing[0]}" if missing else ""
            raise PlanError(
                f"target {region.name}: none of the {sources} sources holds head {lo}{tokens}; "
                f"add the source rank that has it"
            )
        found += [h._replace(lo=lo, hi=hi) for h in complete.values() if h.split.meets(split)]
    return found


def _add(heads: _Heads, index: int, lo: int, hi: int) -> None:
    ranges = heads.setdefault(index, [])
    if ranges and ranges[-1][1] == lo:
        ranges[-1] = (ranges[-1][0], hi)
    else:
        ranges.append((lo, hi))


def _parts(written: _Heads, shared: list[Shared]) -> tuple[Part, ...] | None:
    """None if all that is shared is written, else the parts: regions in a row with equal heads are one."""
    everything: _Heads = {}
    for one in sorted(shared, key=lambda one: (one.number, one.lo)):
        _add(everything, one.number, one.lo, one.hi)
    if written and written == everything:
        return None
    parts: list[Part] = []
    for index, ranges in written.items():
        for lo, hi in ranges:
            last = parts[-1] if parts and len(ranges) == 1 else None
            if last is not None and (last.last, last.lo, last.hi) == (index, lo, hi):
                parts[-1] = Part(last.first, index + 1, lo, hi)
            else:
                parts.append(Part(index, index + 1, lo, hi))
    return tuple(parts)

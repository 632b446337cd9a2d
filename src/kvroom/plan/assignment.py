"""The assignment of a target's heads and tokens to the sources that write them.

The law: every head of every region of the target, for every token, is written by exactly one source. Where several
sources hold the same bytes (replicated KV heads, MLA, a state kept on each rank), the first in the list writes. A head
that no source holds raises a `PlanError` that names it.
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
    """Return the parts that each source writes: None for all that it shares with the target, () for nothing.

    Sources that split the tokens of a request in the same way (equal `size` and `interleave`) are siblings. A head is
    held by siblings together, one of each rank that has tokens of the target. If such a rank is missing, these siblings
    write nothing of the head. Raises `PlanError` if no source holds some layer, component, head and tokens, or if the
    bytes of the two sides differ in kind.
    """
    shared = [shared_heads(source, target) for source in sources]
    holders: list[list[_Holder]] = [[] for _ in target.regions]
    for number, (source, some) in enumerate(zip(sources, shared, strict=True)):
        for one in some:
            holders[one.number].append(_Holder(number, one.lo, one.hi, _split(source, one.target)))
    written: list[_Heads] = [{} for _ in sources]
    known: dict[tuple[object, ...], list[_Holder]] = {}  # regions with equal holders have equal writers
    for index, region in enumerate(target.regions):
        split = _split(target, region)
        key = (region.head_range, split, *holders[index])
        if key not in known:
            known[key] = _writers(region, split, holders[index], len(sources))
        for writer in known[key]:
            _add(written[writer.source], index, writer.lo, writer.hi)
    return tuple(_parts(heads, some) for heads, some in zip(written, shared, strict=True))


_Heads = dict[int, list[tuple[int, int]]]  # number of a region -> ranges of heads, sorted, with gaps between them


def _split(layout: KVLayout, region: KVRegion) -> TokenSplit:
    """Return the split of this region's tokens.

    A region with a window is whole on every rank if tokens interleave. If they do not, the rank that has it reports so.
    """
    split = layout.split
    return _WHOLE if split is None or (split.interleave and layout.tables[region.group].window) else split


def _writers(region: KVRegion, split: TokenSplit, holders: list[_Holder], sources: int) -> list[_Holder]:
    """Return the holders of a region that write, each with the range of heads that it writes, in order of heads."""
    borders = {*region.head_range, *(h.lo for h in holders), *(h.hi for h in holders)}
    found = []
    for lo, hi in pairwise(sorted(borders)):
        families: dict[tuple[int, int], dict[int, _Holder]] = {}
        for h in holders:
            if h.lo <= lo < h.hi:
                families.setdefault((h.split.size, h.split.interleave), {}).setdefault(h.split.rank, h)
        missing = []  # for each family, the first sibling that holds tokens of the target and is not among the sources
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
    """Return None if all that is shared is written, else the parts; consecutive regions with equal heads form one."""
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

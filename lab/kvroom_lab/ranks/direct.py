"""A case in one process, without rooms: the plans of all pairs of ranks, and a memmove for each block.

It shows that plans and checks agree before any process, link or transport is involved.
"""

from __future__ import annotations

import contextlib
import ctypes

from kvroom.plan import Planner, shares
from kvroom.plan.ranks import Place, match_ranks

from .cases import Case, Piece
from .pool import RankPool
from .requests import Placed, part, place_to_receive, place_to_send


def run(case: Case) -> list[str]:
    """Move every request of the case. Return what is wrong after that, for each rank."""
    with contextlib.ExitStack() as stack:
        engines = _Engines(case, stack)
        for room, (tokens, prefix) in enumerate(case.requests):
            engines.hand_over(room, tokens, prefix)
        return engines.wrong_bytes()


class _Engines:
    def __init__(self, case: Case, stack: contextlib.ExitStack) -> None:
        self._case = case
        self._rank_map = match_ranks(case.source.parallel, case.sink.parallel)
        self._sources = {place: RankPool(case, "source", place) for place in case.source.parallel.places()}
        self._sinks = {place: RankPool(case, "sink", place) for place in case.sink.parallel.places()}
        for pool in (*self._sources.values(), *self._sinks.values()):
            stack.callback(pool.close)
        self._sent: dict[Place, dict[int, Placed]] = {place: {} for place in self._sources}
        self._got: dict[Place, dict[int, Placed]] = {place: {} for place in self._sinks}

    def hand_over(self, room: int, tokens: int, prefix: int) -> None:
        for place, pool in self._sources.items():
            self._sent[place][room] = placed = place_to_send(pool, self._case.source, place, tokens)
            pool.write(room, placed.held)
        for place, pool in self._sinks.items():
            self._got[place][room] = into = place_to_receive(pool, tokens, prefix)
            asked = self._rank_map.sources(place)
            parts = shares([self._sources[one].layout for one in asked], pool.layout)
            for one, some in zip(asked, parts, strict=True):
                planner = Planner(self._sources[one].layout, pool.layout, some)
                _move(planner, self._sent[one][room], into, pool, tokens)

    def wrong_bytes(self) -> list[str]:
        found = []
        for side, pools, rooms in (("source", self._sources, self._sent), ("sink", self._sinks, self._got)):
            for place, pool in pools.items():
                whole = {room: placed.held for room, placed in rooms[place].items()}
                found += [f"{side} {place}: {fault}" for fault in pool.wrong_bytes(whole, {})]
        return found


def _move(planner: Planner, sent: Placed, into: Placed, sink: RankPool, tokens: int) -> None:
    offer = into.steps[0]
    for step in sent.steps:
        start = max(step.start, offer.start)
        if start < step.stop:
            target = part(sink, offer, Piece(offer.start, step.stop))
            _copy(planner, step.pages, target.pages, start, step.stop, step.start, offer.start, "")
    for group in sent.windows.keys() & into.windows.keys():
        start = sink.window(group, tokens).start
        _copy(planner, sent.windows[group], into.windows[group], start, tokens, start, start, group)


def _copy(
    planner: Planner,
    source: tuple[int, ...],
    target: tuple[int, ...],
    start: int,
    stop: int,
    source_start: int,
    target_start: int,
    group: str,
) -> None:
    blocks = planner.copies(
        source, target, start, stop, source_start=source_start, target_start=target_start, group=group
    )
    for src, dst, length in zip(*(column.tolist() for column in blocks), strict=True):
        ctypes.memmove(dst, src, length)

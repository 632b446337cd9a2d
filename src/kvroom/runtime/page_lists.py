"""From what rooms say to what plans take: page lists of a room cut to one transfer, group by group.

The law: the sink's extents, the source's blocks and both checksums speak of the same tokens: [start, stop) of the main
group, and of each further group the window that its layout keeps of a request of this length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvroom.core import effects as do
from kvroom.core.inputs import SendPages
from kvroom.core.messages import Offered, Window
from kvroom.errors import PlanError
from kvroom.plan import Blocks, Extents, KVLayout, Planner, check_pages

Spans = Sequence[tuple[int, int]]


class HeldPages(NamedTuple):
    """Tokens [start, stop) of a request; `pages[0]` holds the first of them that this side has."""

    pages: Sequence[int]
    start: int
    stop: int


def extents(planner: Planner, layout: KVLayout, offer: Offered) -> Extents:
    """All bytes that an offer opens, sorted. `planner` is of the layout onto itself. `PlanError`, as from it."""
    main, length = planner.extents(offer.pages, offer.start, offer.stop), offer.length
    further = [
        planner.extents(window.pages, layout.window_start(window.group, length), length, group=window.group)
        for window in offer.windows
    ]
    if not further:
        return main
    address = np.concatenate([part.address for part in (main, *further)])
    nbytes = np.concatenate([part.length for part in (main, *further)])
    order = np.argsort(address)
    address, nbytes = address[order], nbytes[order]
    ends = address + nbytes
    if (address[1:] < ends[:-1]).any():
        raise PlanError("two groups of pages name the same bytes; give each group pages of its own")
    # Extents that touch are made one.
    first = np.flatnonzero(np.concatenate(([True], address[1:] != ends[:-1])))
    return Extents(address[first], np.add.reduceat(nbytes, first)) if first.size else Extents(address, nbytes)


def check_chunk(layout: KVLayout, chunk: SendPages) -> None:
    """`PlanError` unless a chunk's pages are in the pool, hold its tokens, and the last one brings every group."""
    assert chunk.start is not None  # its sender has filled it in
    check_pages(layout, chunk.pages, chunk.start, chunk.stop)
    if not layout.groups and not chunk.windows:
        return
    for window in chunk.windows:
        check_pages(layout, window.pages, layout.window_start(window.group, chunk.stop), chunk.stop, group=window.group)
    given = {window.group for window in chunk.windows}
    needed = {group for group, table in layout.tables.items() if group and table.pages} if chunk.last else set()
    freely = layout.split is not None and not layout.split.interleave  # one of the ranks that split the tokens has it
    if given - needed or (needed - given and not freely):
        raise PlanError(
            f"windows are given for groups {sorted(given)}: "
            + (f"the last chunk brings those of {sorted(needed)}" if chunk.last else "they come with the last chunk")
        )


def blocks(planner: Planner, ours: KVLayout, theirs: KVLayout, submit: do.Submit) -> Blocks:
    """The blocks of one transfer. A group that the source does not bring has none: the sink counts what is missing."""
    offer, parts = submit.offer, []
    if submit.start < submit.stop:
        target = _cut(theirs, offer.pages, offer.start, submit.start, submit.stop)
        source = (submit.pages, target, submit.start, submit.stop)
        parts.append(planner.copies(*source, source_start=submit.pages_start))
    if submit.windows:
        given = {window.group: window.pages for window in submit.windows}
        for window in offer.windows:
            group, length = window.group, offer.length
            if group in given:
                start = ours.window_start(group, length)
                parts.append(planner.copies(given[group], window.pages, start, length, group=group))
    if len(parts) == 1:
        return parts[0]
    nothing = Blocks(*(np.empty(0, np.uint64) for _ in Blocks._fields))
    return Blocks(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))


def held_by_source(
    layout: KVLayout, offer: Offered, chunks: Sequence[SendPages], spans: Spans
) -> Mapping[str, list[HeldPages]]:
    """What a source had for this offer, by group: a page that two chunks share was given with both."""
    found: dict[int, int] = {}
    index = _indexer(layout)
    for chunk in chunks:
        assert chunk.start is not None  # the room has filled it in
        found.update(enumerate(chunk.pages, index(chunk.start)))
    held = [
        HeldPages([found[i] for i in range(index(a), index(a) + layout.window_pages(a, b))], a, b)
        for a, b in _spans(offer.start, offer.stop, spans)
    ]
    last = chunks[-1].windows if chunks else ()
    wanted = {window.group for window in offer.windows}
    return {"": held, **_held_windows(layout, [one for one in last if one.group in wanted], offer.length)}


def held_by_sink(layout: KVLayout, offer: Offered, claim: do.Claim) -> Mapping[str, list[HeldPages]]:
    """What a sink got from one source, by group."""
    spans = _spans(offer.start, offer.stop, claim.spans)
    held = [HeldPages(_cut(layout, offer.pages, offer.start, a, b), a, b) for a, b in spans]
    windows = [one for one in offer.windows if claim.windows is None or one.group in claim.windows]
    return {"": held, **_held_windows(layout, windows, offer.length)}


def _held_windows(layout: KVLayout, windows: Iterable[Window], length: int) -> dict[str, list[HeldPages]]:
    return {
        window.group: [HeldPages(window.pages, layout.window_start(window.group, length), length)] for window in windows
    }


def _spans(start: int, stop: int, spans: Spans) -> Spans:
    return [span for span in spans or ((start, stop),) if span[0] < span[1]]


def _indexer(layout: KVLayout) -> Callable[[int], int]:
    """Which of the request's pages a token is in, or would be."""
    table = layout.table()
    size = max(table.page_tokens, 1)
    return lambda token: table.place(token) // size


def _cut(layout: KVLayout, pages: Sequence[int], begin: int, start: int, stop: int) -> Sequence[int]:
    """Of pages that begin at token `begin`, those that hold tokens [start, stop)."""
    index = _indexer(layout)
    first = index(start) - index(begin)
    return pages[first : first + layout.window_pages(start, stop)]

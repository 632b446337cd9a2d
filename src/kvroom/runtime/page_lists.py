"""The page lists of a room, cut to the tokens of one transfer or checksum, group by group, as plans take them.

The law: the sink's extents, the source's blocks and both checksums cover the same tokens. These are [start, stop) of
the main group, and of each further group the window that its layout keeps of a request of this length.
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
    """Tokens of a request, and the pages that hold them."""

    pages: Sequence[int]
    """The pages; the first one holds the first token of the range that this side has."""
    start: int
    """The first token."""
    stop: int
    """The end of the tokens."""


def extents(planner: Planner, layout: KVLayout, offer: Offered) -> Extents:
    """Return all bytes that an offer opens to writes, sorted; ranges that touch are merged.

    `planner` maps the layout onto itself. Raises `PlanError` if the pages are invalid or two groups share bytes.
    """
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
        raise PlanError("pages of two groups overlap in memory: give each group its own pages")
    first = np.flatnonzero(np.concatenate(([True], address[1:] != ends[:-1])))
    return Extents(address[first], np.add.reduceat(nbytes, first)) if first.size else Extents(address, nbytes)


def check_chunk(layout: KVLayout, chunk: SendPages) -> None:
    """Raise `PlanError` unless a chunk's pages are in the pool and hold its tokens, and the last one has all groups."""
    assert chunk.start is not None  # the handle has filled it in
    check_pages(layout, chunk.pages, chunk.start, chunk.stop)
    if not layout.groups and not chunk.windows:
        return
    for window in chunk.windows:
        check_pages(layout, window.pages, layout.window_start(window.group, chunk.stop), chunk.stop, group=window.group)
    given = {window.group for window in chunk.windows}
    needed = {group for group, table in layout.tables.items() if group and table.pages} if chunk.last else set()
    # If the tokens are split freely between ranks, only the rank that has the window's tokens gives its pages.
    freely = layout.split is not None and not layout.split.interleave
    if given - needed or (needed - given and not freely):
        raise PlanError(
            f"got windows for groups {sorted(given)}: "
            + (f"the last chunk needs those of {sorted(needed)}" if chunk.last else "give windows with the last chunk")
        )


def blocks(planner: Planner, ours: KVLayout, theirs: KVLayout, submit: do.Submit) -> Blocks:
    """Return the blocks of one transfer. A group that the source does not have adds none; the sink finds it missing."""
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
    """Return the tokens and pages that a source had for this offer, by group.

    A page that two chunks share came with both; the later list counts.
    """
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
    """Return the tokens and pages that a sink got from one source, by group."""
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
    """Return the function from a token to the index, among the request's pages, of the page that holds it."""
    table = layout.table()
    size = max(table.page_tokens, 1)
    return lambda token: table.place(token) // size


def _cut(layout: KVLayout, pages: Sequence[int], begin: int, start: int, stop: int) -> Sequence[int]:
    """Return the pages that hold tokens [start, stop), from a list whose first page holds token `begin`."""
    index = _indexer(layout)
    first = index(start) - index(begin)
    return pages[first : first + layout.window_pages(start, stop)]

"""The planner: computes the blocks to copy from two layouts, two page lists and a token window.

The law: a plan is one intersection, over layers, components, heads and tokens. Every element of the window that both
sides hold is written exactly once, no other byte is written, and no two blocks remain that could be one. A count that
does not fit raises a `PlanError` that names both values; no list is cut short.

Pages are given for each `group`, a page table of the engine; "" is the main one. `page_runs` reads page lists, and
`geometry` keeps a call fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from kvroom.errors import PlanError

from .blocks import U64, Blocks, Extents
from .geometry import Geometry, channel
from .intersection import Part, Shared, shared_heads, summary
from .layout import KVLayout
from .page_runs import Pages, SidePages, runs, sole_page
from .tokens import MAX_TOKENS, PageTable


def copies(
    source: KVLayout,
    target: KVLayout,
    source_pages: Pages,
    target_pages: Pages,
    start: int,
    stop: int,
    *,
    source_start: int | None = None,
    target_start: int | None = None,
    group: str = "",
) -> Blocks:
    """Return the blocks of `Planner(source, target).copies(...)`. For more than one call, keep the planner."""
    planner = Planner(source, target)
    return planner.copies(
        source_pages, target_pages, start, stop, source_start=source_start, target_start=target_start, group=group
    )


def extents(
    layout: KVLayout, pages: Pages, start: int, stop: int, *, pages_start: int | None = None, group: str = ""
) -> Extents:
    """Return the exact bytes of a layout that hold tokens [start, stop) in these pages."""
    return Planner(layout, layout).extents(pages, start, stop, pages_start=pages_start, group=group)


def check_pages(layout: KVLayout, pages: Pages, start: int, stop: int, group: str = "") -> None:
    """Raise `PlanError` unless these pages, all different, are in the pool and hold exactly tokens [start, stop)."""
    table = layout.table(group)
    if sole_page(table, pages, start, stop, None) is None:
        SidePages("source", table, pages, start=start, stop=stop).check_distinct()


class _Pair:
    """The data of one group in a planner: the page tables of both sides, and the heads that they share.

    Windows begin at multiples of `span` tokens. `owner` is the source's table as one endless page, None if the source
    holds all tokens that the target holds. Each geometry is computed on first use, because few ranks need both.
    """

    def __init__(self, source: PageTable, target: PageTable, shared: list[Shared]) -> None:
        covers = source.split is None or source.split == target.split
        self.source, self.target = source, target
        self.span = math.lcm(*{one.target.span for one in shared})
        self.owner = None if covers else source._replace(page_tokens=MAX_TOKENS)
        self._channels = [channel(one) for one in shared]

    @cached_property
    def copies(self) -> Geometry:
        """Return the geometry from the source's memory to the target's."""
        return Geometry(self._channels)

    @cached_property
    def writes(self) -> Geometry:
        """Return the geometry of the written bytes, as copies of the target's memory onto itself."""
        return Geometry([one.onto_itself() for one in self._channels])

    def check_start(self, start: int, stop: int) -> None:
        """Raise `PlanError` for a window that begins inside an element."""
        if start % self.span and start < stop:
            raise PlanError(
                f"tokens [{start}, {stop}) begin inside an element that covers several tokens; "
                f"begin at a multiple of {self.span}"
            )


class Planner:
    """Plans copies from one layout into another. Make it once for a pair of ranks; a call then costs microseconds.

    The two layouts must agree on dtype and model, and on size and kind of the bytes where both hold the same layer and
    component. `parts` limits the copies to a part of what they share, see `shares`; with None everything is copied,
    which must be at least one head of one layer. Bytes that only one side holds are no error here, because `shares`
    checks all sources together. Raises `PlanError`. May be called from several threads.
    """

    def __init__(self, source: KVLayout, target: KVLayout, parts: Sequence[Part] | None = None) -> None:
        shared = shared_heads(source, target, parts)
        if not shared and parts is None:
            raise PlanError(
                f"nothing to copy: the source holds {summary(source)}, the target holds {summary(target)}; "
                f"connect ranks that share layers, components and heads"
            )
        self._declared = source.tables.keys() | target.tables.keys()
        by_group: dict[str, list[Shared]] = {}
        for one in shared:
            by_group.setdefault(one.target.group, []).append(one)
        self._pairs = {name: _Pair(source.tables[name], target.tables[name], some) for name, some in by_group.items()}

    def copies(
        self,
        source_pages: Pages,
        target_pages: Pages,
        start: int,
        stop: int,
        *,
        source_start: int | None = None,
        target_start: int | None = None,
        group: str = "",
    ) -> Blocks:
        """Return the blocks that copy tokens [start, stop) of a request, sorted by `dst`; none for an empty window.

        `source_pages` hold exactly tokens [source_start, stop), and `target_pages` exactly [target_start, stop); both
        default to `start`. The pages are those of `group`; a group that the two layouts do not share has no blocks.
        Target pages must not repeat. Raises `PlanError`.
        """
        pair = self._pairs.get(group)
        if pair is None:
            return Blocks(*self._nothing(group, 3))
        if pair.span != 1:
            pair.check_start(start, stop)
        src_page = sole_page(pair.source, source_pages, start, stop, source_start)
        dst_page = sole_page(pair.target, target_pages, start, stop, target_start)
        if src_page is not None and dst_page is not None:
            src_token, dst_token = start % pair.source.page_tokens, start % pair.target.page_tokens
            return pair.copies.within_a_page(src_page, dst_page, src_token, dst_token, stop - start)
        source = SidePages("source", pair.source, source_pages, start=start, stop=stop, list_start=source_start)
        target = SidePages("target", pair.target, target_pages, start=start, stop=stop, list_start=target_start)
        target.check_distinct()
        return pair.copies.blocks(runs(source, target, start, stop))

    def extents(
        self, pages: Pages, start: int, stop: int, *, pages_start: int | None = None, group: str = ""
    ) -> Extents:
        """Return the exact bytes that `copies` would write into these target pages, whatever the source's pages are.

        With a planner of a layout onto itself these are all bytes of the window. Raises `PlanError`.
        """
        pair = self._pairs.get(group)
        if pair is None:
            return Extents(*self._nothing(group, 2))
        if pair.span != 1:
            pair.check_start(start, stop)
        page = sole_page(pair.target, pages, start, stop, pages_start) if pair.owner is None else None
        if page is not None:
            token = start % pair.target.page_tokens
            blocks = pair.writes.within_a_page(page, page, token, token, stop - start)
            return Extents(blocks.dst, blocks.length)
        target = SidePages("target", pair.target, pages, start=start, stop=stop, list_start=pages_start)
        target.check_distinct()
        blocks = pair.writes.blocks(runs(target, target, start, stop, pair.owner))
        return Extents(blocks.dst, blocks.length)

    def _nothing(self, group: str, columns: int) -> list[U64]:
        """Return empty columns for a group that one of the layouts declares. Raises `PlanError` if neither does."""
        if group not in self._declared:
            raise PlanError(
                f"no group {group!r} in either layout; they have {sorted(self._declared)}, give one of these"
            )
        return [np.empty(0, np.uint64) for _ in range(columns)]

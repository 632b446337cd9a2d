"""From two layouts, two page lists and a token window to the blocks to copy.

The law: a plan is one intersection, over layers, components, heads and tokens. Every element of the window that both
sides hold is written exactly once, nothing else is touched, and no two blocks remain that could be one. A count that
does not fit is a `PlanError` that names both values; nothing is cut short.

How it stays fast: the geometry of a pair of layouts never changes, so a `Planner` works it out once. Tokens of one
source page that go to one target page make a *run*. Runs that begin at the same offsets and are equally long have the
same *stencil*: the blocks of all layers, relative to the two pages. Planning a request is looking up a few stencils
and adding page addresses to them, in NumPy, over all runs at once.

Page lists follow one convention: a list begins at some token of the request (`source_start`, `target_start`), page
borders lie at multiples of that side's page size counted from token 0, so `pages[i]` holds the tokens of page
`list_start // page_tokens + i` of the request, and the list ends with the page that holds the window's last token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvroom.errors import PlanError
from kvroom.plan.blocks import U64, Blocks, Extents
from kvroom.plan.layout import PAGE_TOKENS_LIMIT, KVLayout, KVRegion

I64 = npt.NDArray[np.int64]
Pages = Sequence[int] | npt.NDArray[np.integer]

TOKENS_LIMIT = 2**48

# A planner keeps this many stencils of at most so many blocks: making a larger one costs little beside using it.
_STENCILS_LIMIT = 128
_STENCIL_BLOCKS_LIMIT = 8192


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
) -> Blocks:
    """Blocks that copy tokens [start, stop) of a request: `Planner(source, target).copies(...)`, made for one call."""
    planner = Planner(source, target)
    return planner.copies(source_pages, target_pages, start, stop, source_start=source_start, target_start=target_start)


def extents(layout: KVLayout, pages: Pages, start: int, stop: int, *, pages_start: int | None = None) -> Extents:
    """The exact bytes of a layout that hold tokens [start, stop) in these pages."""
    return Planner(layout, layout).extents(pages, start, stop, pages_start=pages_start)


def check_pages(layout: KVLayout, pages: Pages, start: int, stop: int) -> None:
    """Raise `PlanError` unless these pages, all different, are in the pool and hold exactly tokens [start, stop)."""
    if _sole_page(layout, pages, start, stop, None) is None:
        _Side("source", layout, pages, start, stop, None).check_distinct()


def check_cover(sources: Sequence[KVLayout], target: KVLayout) -> None:
    """Check that the source ranks together hold every head of every region of the target, each exactly once.

    One pair of layouts need not cover: a source rank may hold some layers (PP) or some heads (TP). What no rank holds,
    or more than one would write, is a fault of the set. Raises `PlanError`.
    """
    held = [(rank, s, t) for rank, source in enumerate(sources) for s, t in shared_regions(source, target)]
    for region in target.regions:
        lo, hi = region.head_range
        done = lo
        parts = sorted((max(lo, s.head_range[0]), min(hi, s.head_range[1]), rank) for rank, s, t in held if t is region)
        for begin, end, rank in parts:
            if begin < done:
                raise PlanError(
                    f"target {region.name}: source {rank} holds heads [{begin}, {end}), and another source holds head "
                    f"{begin} too; choose one source for each head"
                )
            if begin > done:
                break
            done = end
        if done < hi:
            raise PlanError(
                f"target {region.name}: none of the {len(sources)} sources holds head {done}; "
                f"add the source rank that has it"
            )


class Planner:
    """Plans copies from one layout into another. Make it once for a pair of ranks; a call then costs microseconds.

    The two must agree on dtype and model, and on `head_bytes` wherever both hold the same layer and component; they
    must share at least one head of one layer. What only one side holds is not an error here: see `check_cover`.
    Raises `PlanError`. Safe to call from several threads.
    """

    def __init__(self, source: KVLayout, target: KVLayout) -> None:
        pairs = [_channel(s, t) for s, t in shared_regions(source, target)]
        if not pairs:
            raise PlanError(
                f"nothing to copy: the source holds {_summary(source)}, the target holds {_summary(target)}; "
                f"connect ranks that share layers, components and heads"
            )
        self._source = source
        self._target = target
        self._copies = _Geometry(pairs)
        self._writes = _Geometry([channel.onto_itself() for channel in pairs])

    def copies(
        self,
        source_pages: Pages,
        target_pages: Pages,
        start: int,
        stop: int,
        *,
        source_start: int | None = None,
        target_start: int | None = None,
    ) -> Blocks:
        """Blocks that copy tokens [start, stop) of a request, sorted by `dst`; none for an empty window.

        `source_pages` hold tokens [source_start, stop), `target_pages` hold [target_start, stop), each exactly;
        both lists begin at `start` unless told otherwise. Target pages must not repeat. Raises `PlanError`.
        """
        src_page = _sole_page(self._source, source_pages, start, stop, source_start)
        dst_page = _sole_page(self._target, target_pages, start, stop, target_start)
        if src_page is not None and dst_page is not None:
            src_token, dst_token = start % self._source.page_tokens, start % self._target.page_tokens
            return self._copies.within_a_page(src_page, dst_page, src_token, dst_token, stop - start)
        source = _Side("source", self._source, source_pages, start, stop, source_start)
        target = _Side("target", self._target, target_pages, start, stop, target_start)
        target.check_distinct()
        return self._copies.blocks(_runs(source, target, start, stop))

    def extents(self, pages: Pages, start: int, stop: int, *, pages_start: int | None = None) -> Extents:
        """The exact bytes that `copies` would write into these target pages, whatever the source's pages are.

        With a planner of a layout onto itself: all bytes of the window. Raises `PlanError`.
        """
        page = _sole_page(self._target, pages, start, stop, pages_start)
        if page is not None:
            token = start % self._target.page_tokens
            blocks = self._writes.within_a_page(page, page, token, token, stop - start)
            return Extents(blocks.dst, blocks.length)
        target = _Side("target", self._target, pages, start, stop, pages_start)
        target.check_distinct()
        blocks = self._writes.blocks(_runs(target, target, start, stop))
        return Extents(blocks.dst, blocks.length)


def shared_regions(source: KVLayout, target: KVLayout) -> list[tuple[KVRegion, KVRegion]]:
    """Pairs of regions that hold the same heads of the same layer and component. Raises `PlanError` if bytes differ."""
    if (source.dtype, source.model) != (target.dtype, target.model):
        raise PlanError(
            f"source has dtype {source.dtype!r} and model {source.model!r}, target has dtype {target.dtype!r} and "
            f"model {target.model!r}; start both sides with the same model and cache dtype"
        )
    by_key: dict[tuple[int, str], list[KVRegion]] = {}
    for region in source.regions:
        by_key.setdefault((region.layer, region.component), []).append(region)
    pairs = [(s, t) for t in target.regions for s in by_key.get((t.layer, t.component), ())]
    for s, t in pairs:
        if s.head_bytes != t.head_bytes:
            raise PlanError(
                f"source {s.name} has {s.head_bytes} bytes a head, target {t.name} has {t.head_bytes}; "
                f"start both sides with the same model and cache dtype"
            )
    return [(s, t) for s, t in pairs if max(s.head_range[0], t.head_range[0]) < min(s.head_range[1], t.head_range[1])]


def _summary(layout: KVLayout) -> str:
    layers = [r.layer for r in layout.regions]
    components = sorted({r.component for r in layout.regions})
    heads = sorted({r.head_range for r in layout.regions})
    return f"layers {min(layers)} to {max(layers)}, components {components}, heads {[list(h) for h in heads]}"


def _sole_page(layout: KVLayout, pages: Pages, start: int, stop: int, list_start: int | None) -> int | None:
    """The page that holds the whole window, if it is the only one listed. None: ask `_Side`, which also finds faults.

    A small room pays for every array that is made, so the smallest one is planned without `_Side` and `_runs`.
    """
    begin = start if list_start is None else list_start
    if len(pages) != 1 or not 0 <= begin <= start < stop <= TOKENS_LIMIT:
        return None
    page = pages[0]
    alone = begin // layout.page_tokens == (stop - 1) // layout.page_tokens
    return page if alone and type(page) is int and 0 <= page < layout.pages else None


class _Side:
    """One side's page list, checked against the window."""

    def __init__(
        self, side: str, layout: KVLayout, pages: Pages, start: int, stop: int, list_start: int | None
    ) -> None:
        begin = start if list_start is None else list_start
        if not 0 <= begin <= start <= stop <= TOKENS_LIMIT:
            raise PlanError(
                f"tokens [{start}, {stop}) with {side} pages that begin at token {begin}; "
                f"0 <= pages' begin <= start <= stop <= {TOKENS_LIMIT} is required"
            )
        self.side = side
        self.page_tokens = layout.page_tokens
        self.first_page = begin // layout.page_tokens
        self.pages = self._numbers(pages)
        expected = layout.window_pages(begin, stop)
        if self.pages.size != expected:
            raise PlanError(
                f"{self.pages.size} {side} pages given, but tokens [{begin}, {stop}) take {expected} pages "
                f"of {layout.page_tokens} tokens"
            )
        if expected and (self.pages.min() < 0 or self.pages.max() >= layout.pages):
            wrong = self.pages[(self.pages < 0) | (self.pages >= layout.pages)][0]
            raise PlanError(f"{side} page {wrong} is not in the {side}'s pool of pages [0, {layout.pages})")

    def _numbers(self, pages: Pages) -> npt.NDArray[np.integer]:
        numbers = np.asarray(pages)
        if numbers.size == 0:
            return np.empty(0, np.int64)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise PlanError(f"{self.side} pages of type {numbers.dtype} and shape {numbers.shape}; give a list of ints")
        return numbers

    def check_distinct(self) -> None:
        """A page that occurs twice would be written twice."""
        if self.pages.size < 2:
            return
        ordered = np.sort(self.pages)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise PlanError(f"{self.side} page {repeated[0]} occurs twice; each page can hold one part of the request")

    def borders(self, start: int, stop: int) -> I64:
        """Tokens strictly inside (start, stop) at which a new page begins."""
        size = self.page_tokens
        return np.arange((start // size + 1) * size, stop, size, dtype=np.int64)

    def locate(self, tokens: I64) -> tuple[U64, I64]:
        """The page number and the token in the page of each token."""
        page, token = np.divmod(tokens, self.page_tokens)
        return self.pages[page - self.first_page].astype(np.uint64), token


class _Runs(NamedTuple):
    """Run i: `length[i]` tokens from `src_token[i]` of page `src_page[i]` to the same of the target; by target page."""

    src_page: U64
    dst_page: U64
    src_token: I64
    dst_token: I64
    length: I64


def _runs(source: _Side, target: _Side, start: int, stop: int) -> _Runs:
    """Cut tokens [start, stop) wherever either side begins a new page."""
    inner = target.borders(start, stop)
    if source.page_tokens != target.page_tokens:
        inner = np.union1d(inner, source.borders(start, stop))
    cuts = np.concatenate(([start], inner, [stop]))
    begin = cuts[:-1] if stop > start else cuts[:0]
    length = cuts[1 : begin.size + 1] - begin
    src_page, src_token = source.locate(begin)
    dst_page, dst_token = target.locate(begin)
    runs = _Runs(src_page, dst_page, src_token, dst_token, length)
    if (dst_page[1:] >= dst_page[:-1]).all():
        return runs
    order = np.argsort(dst_page, kind="stable")
    return _Runs(src_page[order], dst_page[order], src_token[order], dst_token[order], length[order])


class _Shape(NamedTuple):
    """Strides of both sides within a page; channels that agree on them are handled as one array."""

    heads: int
    head_bytes: int
    src_token: int
    dst_token: int
    src_head: int
    dst_head: int


class _Channel(NamedTuple):
    """The heads that one source region and one target region share. Bases are addresses of the first shared head."""

    src: int
    dst: int
    src_page: int
    dst_page: int
    shape: _Shape

    def onto_itself(self) -> _Channel:
        """The target's part, as a copy onto itself."""
        s = self.shape
        shape = s._replace(src_token=s.dst_token, src_head=s.dst_head)
        return _Channel(self.dst, self.dst, self.dst_page, self.dst_page, shape)


def _channel(s: KVRegion, t: KVRegion) -> _Channel:
    lo = max(s.head_range[0], t.head_range[0])
    hi = min(s.head_range[1], t.head_range[1])
    return _Channel(
        s.base + (lo - s.head_range[0]) * s.head_stride,
        t.base + (lo - t.head_range[0]) * t.head_stride,
        s.page_stride,
        t.page_stride,
        _Shape(hi - lo, t.head_bytes, s.token_stride, t.token_stride, s.head_stride, t.head_stride),
    )


class _Stencils(NamedTuple):
    """The blocks of one or more kinds of run, as if all pages were page 0: by kind, then bundle, then `dst`.

    `counts` and `first` are [bundles, kinds]: how many blocks, and the index of the first one.
    """

    src: U64
    dst: U64
    length: U64
    counts: I64
    first: I64


class _Geometry:
    """All channels of a pair of layouts, and the stencils made of them so far.

    Channels that lie within one target page of each other and have equal page strides form a *bundle*: with runs in
    page order, a bundle's blocks come out sorted. Bundles seldom interleave, so sorting all blocks is seldom needed.
    """

    def __init__(self, channels: Iterable[_Channel]) -> None:
        ordered = sorted(channels, key=lambda c: c.dst)
        self._src = np.array([c.src for c in ordered], np.uint64)
        self._dst = np.array([c.dst for c in ordered], np.uint64)
        leads = [0]
        for i, c in enumerate(ordered):
            first = ordered[leads[-1]]
            alike = (c.src_page, c.dst_page) == (first.src_page, first.dst_page)
            if not alike or c.dst - first.dst >= first.dst_page:
                leads.append(i)
        self._bundle = np.repeat(np.arange(len(leads)), np.diff([*leads, len(ordered)]))
        self._src_page = np.array([ordered[i].src_page for i in leads], np.uint64)[:, None]
        self._dst_page = np.array([ordered[i].dst_page for i in leads], np.uint64)[:, None]
        members: dict[_Shape, list[int]] = {}
        for i, c in enumerate(ordered):
            members.setdefault(c.shape, []).append(i)
        self._shapes = [(shape, np.array(which)) for shape, which in members.items()]
        self._stencils: dict[int, _Stencils] = {}
        self._steps: dict[int, tuple[U64, U64]] = {}  # for a stencil: the page strides of each of its blocks

    def within_a_page(self, src_page: int, dst_page: int, src_token: int, dst_token: int, tokens: int) -> Blocks:
        """`blocks` of a single run."""
        key = _stencil_key(src_token, dst_token, tokens)
        stencil = self._stencil(key)
        steps = self._steps.get(key)
        if steps is None:
            counts = stencil.counts[:, 0]
            steps = np.repeat(self._src_page[:, 0], counts), np.repeat(self._dst_page[:, 0], counts)
            if key in self._stencils:
                self._steps[key] = steps
        src, dst = stencil.src + steps[0] * np.uint64(src_page), stencil.dst + steps[1] * np.uint64(dst_page)
        return _maximal(src, dst, stencil.length)

    def blocks(self, runs: _Runs) -> Blocks:
        """All blocks of these runs: sorted by `dst`, maximal."""
        if not runs.length.size:
            return Blocks(*(np.empty(0, np.uint64) for _ in Blocks._fields))
        stencils, kind = self._stencils_of(runs)
        # One segment for each (bundle, run): so many blocks, from there on, moved by so much.
        counts = stencils.counts[:, kind].ravel()
        index = stencils.first[:, kind].ravel()
        src_move = (self._src_page * runs.src_page).ravel()
        dst_move = (self._dst_page * runs.dst_page).ravel()
        if not (counts == 1).all():
            before = np.cumsum(counts) - counts
            index = np.arange(counts.sum()) + np.repeat(index - before, counts)
            src_move, dst_move = np.repeat(src_move, counts), np.repeat(dst_move, counts)
        return _maximal(stencils.src[index] + src_move, stencils.dst[index] + dst_move, stencils.length[index])

    def _stencils_of(self, runs: _Runs) -> tuple[_Stencils, I64]:
        """The stencils that these runs need, and which kind each run is."""
        key = _stencil_key(runs.src_token, runs.dst_token, runs.length)
        if key.size == 1:
            kinds, kind = key, np.zeros(1, np.int64)
        else:
            kinds, kind = np.unique(key, return_inverse=True)
        return _side_by_side([self._stencil(k) for k in kinds.tolist()]), kind

    def _stencil(self, key: int) -> _Stencils:
        stencil = self._stencils.get(key)
        if stencil is None:
            low = PAGE_TOKENS_LIMIT - 1
            stencil = self._make_stencil(key >> 40, key >> 20 & low, (key & low) + 1)
            if stencil.src.size <= _STENCIL_BLOCKS_LIMIT:
                if len(self._stencils) >= _STENCILS_LIMIT:
                    self._stencils.clear()
                    self._steps.clear()
                self._stencils[key] = stencil
        return stencil

    def _make_stencil(self, src_token: int, dst_token: int, tokens: int) -> _Stencils:
        parts = []
        for shape, which in self._shapes:
            src, dst, unit = _pieces(shape, tokens)
            src = self._src[which, None] + (src + np.uint64(src_token * shape.src_token))
            dst = self._dst[which, None] + (dst + np.uint64(dst_token * shape.dst_token))
            bundle = np.broadcast_to(self._bundle[which, None], src.shape)
            parts.append((src.ravel(), dst.ravel(), np.full(src.size, unit, np.uint64), bundle.ravel()))
        src, dst, length, bundle = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((dst, bundle))
        src, dst, length, bundle = src[order], dst[order], length[order], bundle[order]
        joined = _continues(src, dst, length) & (bundle[1:] == bundle[:-1])
        blocks = _join(src, dst, length, joined)
        leads = np.concatenate(([True], ~joined))
        counts = np.bincount(bundle[leads], minlength=len(self._src_page))[:, None]
        return _Stencils(*blocks, counts, np.cumsum(counts, axis=0) - counts)


_Tokens = TypeVar("_Tokens", int, I64)


def _stencil_key(src_token: _Tokens, dst_token: _Tokens, tokens: _Tokens) -> _Tokens:
    """One number for a kind of run: page sizes are at most 2**20, so three of them fit."""
    return (src_token << 40) | (dst_token << 20) | (tokens - 1)


def _side_by_side(stencils: list[_Stencils]) -> _Stencils:
    """All of them as one."""
    if len(stencils) == 1:
        return stencils[0]
    sizes = np.array([stencil.src.size for stencil in stencils], np.int64)
    counts = np.concatenate([stencil.counts for stencil in stencils], axis=1)
    first = np.concatenate([stencil.first for stencil in stencils], axis=1) + (np.cumsum(sizes) - sizes)
    src, dst, length = (np.concatenate([stencil[i] for stencil in stencils]) for i in range(3))
    return _Stencils(src, dst, length, counts, first)


def _pieces(shape: _Shape, tokens: int) -> tuple[U64, U64, int]:
    """Offsets on both sides of the pieces of one channel's run, and the bytes of each piece.

    An axis that is contiguous on both sides makes the piece longer instead of making more pieces.
    """
    unit = shape.head_bytes
    axes = [(tokens, shape.src_token, shape.dst_token), (shape.heads, shape.src_head, shape.dst_head)]
    axes = [axis for axis in axes if axis[0] > 1]
    while dense := [axis for axis in axes if axis[1] == axis[2] == unit]:
        axes.remove(dense[0])
        unit *= dense[0][0]
    src = dst = np.zeros(1, np.uint64)
    for count, src_stride, dst_stride in axes:
        steps = np.arange(count, dtype=np.uint64)
        src = (src[:, None] + steps * np.uint64(src_stride)).ravel()
        dst = (dst[:, None] + steps * np.uint64(dst_stride)).ravel()
    return src, dst, unit


def _continues(src: U64, dst: U64, length: U64) -> npt.NDArray[np.bool_]:
    """Whether block i + 1 begins where block i ends, on both sides; one shorter than the blocks."""
    joined: npt.NDArray[np.bool_] = dst[:-1] + length[:-1] == dst[1:]
    joined &= src[:-1] + length[:-1] == src[1:]
    return joined


def _join(src: U64, dst: U64, length: U64, joined: npt.NDArray[np.bool_]) -> Blocks:
    """Make one block of every chain of blocks that continue each other."""
    if not joined.any():
        return Blocks(src, dst, length)
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return Blocks(src[first], dst[first], np.add.reduceat(length, first))


def _maximal(src: U64, dst: U64, length: U64) -> Blocks:
    """Sort by `dst` and join. Target elements share no byte, so blocks that touch on both sides become neighbours."""
    if not (dst[1:] > dst[:-1]).all():
        order = np.argsort(dst, kind="stable")
        src, dst, length = src[order], dst[order], length[order]
    return _join(src, dst, length, _continues(src, dst, length))

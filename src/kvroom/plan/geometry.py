"""The geometry of a pair of layouts, computed once: from runs of tokens to blocks.

The law: the blocks that `Geometry` returns are sorted by `dst` and maximal: no two of them could be one.

Tokens of one source page that go to one target page make a *run*. Runs with equal offsets and lengths have the same
*stencil*: the blocks of all layers, relative to the two pages. To plan a request is to look up a few stencils and add
page addresses to them, in NumPy and for all runs together.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .blocks import U64, Blocks
from .intersection import Shared
from .layout import MAX_PAGE_TOKENS
from .page_runs import Runs
from .tokens import I64

# A planner caches this many stencils of at most this many blocks: computing a larger one costs little beside using it.
_MAX_STENCILS = 128
_MAX_STENCIL_BLOCKS = 8192
# Consecutive runs of one kind make a turn. With more turns than this, each run is planned on its own.
_MAX_TURNS = 32


class _Shape(NamedTuple):
    """Strides of both sides within a page; channels that agree on them are handled as one array."""

    heads: int
    head_bytes: int
    span: int
    src_token: int
    dst_token: int
    src_head: int
    dst_head: int


class Channel(NamedTuple):
    """The heads that one source region and one target region share. Bases are addresses of the first shared head."""

    src: int
    dst: int
    src_page: int
    dst_page: int
    shape: _Shape

    def onto_itself(self) -> Channel:
        """Return a channel that copies the target's part onto itself: its blocks are the bytes written here."""
        s = self.shape
        shape = s._replace(src_token=s.dst_token, src_head=s.dst_head)
        return Channel(self.dst, self.dst, self.dst_page, self.dst_page, shape)


def channel(one: Shared) -> Channel:
    """Return the channel of the heads that two regions share."""
    s, t = one.source, one.target
    return Channel(
        s.base + (one.lo - s.head_range[0]) * s.head_stride,
        t.base + (one.lo - t.head_range[0]) * t.head_stride,
        s.page_stride,
        t.page_stride,
        _Shape(
            heads=one.hi - one.lo,
            head_bytes=t.head_bytes,
            span=t.span,
            src_token=s.token_stride,
            dst_token=t.token_stride,
            src_head=s.head_stride,
            dst_head=t.head_stride,
        ),
    )


class _Stencils(NamedTuple):
    """The blocks of one or more kinds of run, as if all pages were page 0: by kind, then bundle, then `dst`.

    `counts` and `first` are arrays [bundles, kinds] of the number of blocks and the index of the first one.
    """

    src: U64
    dst: U64
    length: U64
    counts: I64
    first: I64


class Geometry:
    """All channels of a pair of layouts, and a cache of their stencils.

    Channels that lie within one target page of each other and have equal page strides form a *bundle*: with runs in
    page order, the blocks of a bundle are sorted. Bundles seldom interleave, so it is seldom necessary to sort all
    blocks.
    """

    def __init__(self, channels: Iterable[Channel]) -> None:
        ordered = sorted(channels, key=lambda c: c.dst)
        self._src = np.array([c.src for c in ordered], np.uint64)
        self._dst = np.array([c.dst for c in ordered], np.uint64)
        leads = [0]
        for i, c in enumerate(ordered):
            first = ordered[leads[-1]]
            same_pages = (c.src_page, c.dst_page) == (first.src_page, first.dst_page)
            if not same_pages or c.dst - first.dst >= first.dst_page:
                leads.append(i)
        self._bundle = np.repeat(np.arange(len(leads)), np.diff([*leads, len(ordered)]))
        self._src_page = np.array([ordered[i].src_page for i in leads], np.uint64)[:, None]
        self._dst_page = np.array([ordered[i].dst_page for i in leads], np.uint64)[:, None]
        members: dict[_Shape, list[int]] = {}
        for i, c in enumerate(ordered):
            members.setdefault(c.shape, []).append(i)
        self._shapes = [(shape, np.array(which)) for shape, which in members.items()]
        self._stencils: dict[int, _Stencils] = {}
        self._steps: dict[int, tuple[U64, U64]] = {}  # stencil key -> the page strides of each of its blocks

    def within_a_page(self, src_page: int, dst_page: int, src_token: int, dst_token: int, tokens: int) -> Blocks:
        """Return the blocks of a single run, without the arrays of `blocks`, which would dominate a small room."""
        key = _stencil_key(src_token, dst_token, tokens)
        stencil = self._stencil(key)
        steps = self._steps.get(key)
        if steps is None:
            counts = stencil.counts[:, 0]
            steps = np.repeat(self._src_page[:, 0], counts), np.repeat(self._dst_page[:, 0], counts)
            if key in self._stencils:
                self._steps[key] = steps
        src, dst = stencil.src + steps[0] * np.uint64(src_page), stencil.dst + steps[1] * np.uint64(dst_page)
        return maximal(src, dst, stencil.length)

    def blocks(self, runs: Runs) -> Blocks:
        """Return all blocks of these runs, sorted by `dst` and maximal."""
        if not runs.length.size:
            return Blocks(*(np.empty(0, np.uint64) for _ in Blocks._fields))
        key = _stencil_key(runs.src_token, runs.dst_token, runs.length)
        if key.size == 1:
            kinds, kind = key, np.zeros(1, np.int64)
        else:
            kinds, kind = np.unique(key, return_inverse=True)
        found = [self._stencil(k) for k in kinds.tolist()]
        stencils = found[0]
        if len(found) > 1:  # concatenate them into one
            sizes = np.array([each.src.size for each in found], np.int64)
            src, dst, length = (np.concatenate([each[i] for each in found]) for i in range(3))
            counts = np.concatenate([each.counts for each in found], axis=1)
            first = np.concatenate([each.first for each in found], axis=1) + (np.cumsum(sizes) - sizes)
            stencils = _Stencils(src, dst, length, counts, first)
        even = (stencils.counts == stencils.counts[0]).all()  # all bundles have equally many blocks of each kind
        turns = [0, *(np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist(), kind.size]
        if even and len(turns) <= _MAX_TURNS:
            return maximal(*self._in_turns(stencils, kind, turns, runs))
        # Each run on its own: for each (bundle, run) take its segment of the stencils and add the page addresses.
        index = stencils.first[:, kind].ravel()
        src_move, dst_move = (self._src_page * runs.src_page).ravel(), (self._dst_page * runs.dst_page).ravel()
        if not (stencils.counts == 1).all():
            counts = stencils.counts[:, kind].ravel()
            before = np.cumsum(counts) - counts
            index = np.arange(counts.sum()) + np.repeat(index - before, counts)
            src_move, dst_move = np.repeat(src_move, counts), np.repeat(dst_move, counts)
        src_move += stencils.src[index]
        dst_move += stencils.dst[index]
        return maximal(src_move, dst_move, stencils.length[index])

    def _in_turns(self, stencils: _Stencils, kind: I64, turns: list[int], runs: Runs) -> Blocks:
        """Return the blocks of runs with few turns, if all bundles have equally many blocks of each kind.

        The result is filled as rows of [bundles, blocks of a bundle]. It needs no index array: each turn is the sum of
        two small arrays.
        """
        bundles = len(self._src_page)
        counts = stencils.counts[0, kind]
        ends = np.cumsum(counts)
        blocks = Blocks(*(np.empty((bundles, ends[-1]), np.uint64) for _ in Blocks._fields))
        for begin, end in pairwise(turns):
            count, first = counts[begin], stencils.first[0, kind[begin]]
            one = slice(first, first + bundles * count)
            src, dst, length = (column[one].reshape(bundles, 1, count) for column in stencils[:3])
            at, shape = slice(ends[begin] - count, ends[end - 1]), (bundles, end - begin, count)
            np.add(src, (self._src_page * runs.src_page[begin:end])[:, :, None], out=blocks.src[:, at].reshape(shape))
            np.add(dst, (self._dst_page * runs.dst_page[begin:end])[:, :, None], out=blocks.dst[:, at].reshape(shape))
            blocks.length[:, at].reshape(shape)[...] = length
        return Blocks(*(column.ravel() for column in blocks))

    def _stencil(self, key: int) -> _Stencils:
        stencil = self._stencils.get(key)
        if stencil is not None:
            return stencil
        low = MAX_PAGE_TOKENS - 1
        src_token, dst_token, tokens = key >> 40, key >> 20 & low, (key & low) + 1
        parts = []
        for shape, which in self._shapes:
            src, dst, unit = _pieces(shape, tokens)
            src = self._src[which, None] + (src + np.uint64(src_token // shape.span * shape.src_token))
            dst = self._dst[which, None] + (dst + np.uint64(dst_token // shape.span * shape.dst_token))
            bundle = np.broadcast_to(self._bundle[which, None], src.shape)
            parts.append((src.ravel(), dst.ravel(), np.full(src.size, unit, np.uint64), bundle.ravel()))
        src, dst, length, bundle = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((dst, bundle))
        src, dst, length, bundle = src[order], dst[order], length[order], bundle[order]
        joined = _continues(src, dst, length) & (bundle[1:] == bundle[:-1])
        blocks = _join(src, dst, length, joined)
        leads = np.concatenate(([True], ~joined))
        counts = np.bincount(bundle[leads], minlength=len(self._src_page))[:, None]
        stencil = _Stencils(*blocks, counts=counts, first=np.cumsum(counts, axis=0) - counts)
        if stencil.src.size <= _MAX_STENCIL_BLOCKS:
            if len(self._stencils) >= _MAX_STENCILS:
                self._stencils.clear()
                self._steps.clear()
            self._stencils[key] = stencil
        return stencil


_Tokens = TypeVar("_Tokens", int, I64)


def _stencil_key(src_token: _Tokens, dst_token: _Tokens, tokens: _Tokens) -> _Tokens:
    """Return one number for a kind of run. Page sizes are at most 2**20, so three offsets fit into 64 bits."""
    return (src_token << 40) | (dst_token << 20) | (tokens - 1)


def _pieces(shape: _Shape, tokens: int) -> tuple[U64, U64, int]:
    """Return the offsets on both sides of the pieces of one channel's run, and the bytes of each piece.

    An axis that is contiguous on both sides makes the pieces longer instead of more. A last element that covers more
    tokens than the run has left is copied in full.
    """
    unit = shape.head_bytes
    axes = [(-(-tokens // shape.span), shape.src_token, shape.dst_token), (shape.heads, shape.src_head, shape.dst_head)]
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
    """Return a mask, one shorter than the blocks: block i + 1 begins where block i ends, on both sides."""
    joined: npt.NDArray[np.bool_] = dst[:-1] + length[:-1] == dst[1:]
    if joined.any():
        joined &= src[:-1] + length[:-1] == src[1:]
    return joined


def _join(src: U64, dst: U64, length: U64, joined: npt.NDArray[np.bool_]) -> Blocks:
    """Join every chain of blocks that continue each other into one block."""
    if not joined.any():
        return Blocks(src, dst, length)
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return Blocks(src[first], dst[first], np.add.reduceat(length, first))


def maximal(src: U64, dst: U64, length: U64) -> Blocks:
    """Sort by `dst` and join. Target elements share no byte, so sorting makes blocks that touch neighbours."""
    if not (dst[1:] > dst[:-1]).all():
        order = np.argsort(dst, kind="stable")
        src, dst, length = src[order], dst[order], length[order]
    return _join(src, dst, length, _continues(src, dst, length))

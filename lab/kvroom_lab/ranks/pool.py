"""The memory of one rank: laid out as its engine would, filled with words that identify themselves, checked entirely.

The law: the content of every byte is known at every time, including the gaps between arrays. The expected content is
computed by counting tokens and from the formula of `KVRegion`; neither plans nor the arithmetic of layouts are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvroom.plan import KVLayout, KVRegion, TokenSplit, array_regions
from kvroom.plan.ranks import Parallel, Place
from kvroom.transports.kit.pool import allocate

from .cases import Case, Kind, Side, SideName
from .words import COMPONENTS, FILLER, U64, WORD_BYTES, filler, read, words

GAP_BYTES = 4096  # before, between and behind the arrays; this memory is not registered
_SHOWN = 3


class Held(NamedTuple):
    """Pages of one group that hold a rank's tokens of [start, stop) of a request."""

    group: str
    start: int
    stop: int
    pages: tuple[int, ...]


class RankPool:
    """The pool of the rank at `place` of one side of a case, large enough for all requests of the case.

    Close it after use. With `shared`, its memory is of a kind that `local` can map into another process.
    """

    def __init__(self, case: Case, side: SideName, place: Place, *, shared: bool = False) -> None:
        self._side = ("source", "sink").index(side)
        tokens = sum(tokens for tokens, _ in case.requests)
        plans = [_Array(kind, case.side(side), place, tokens, len(case.requests)) for kind in case.kinds]
        self._arrays = [plan for plan in plans if plan.layers]
        arrays = {plan.kind.pool or number: plan for number, plan in enumerate(self._arrays)}  # one array for each pool
        self.memory = allocate(GAP_BYTES + sum(plan.nbytes + GAP_BYTES for plan in arrays.values()), shared=shared)
        at, bases = self.memory.address + GAP_BYTES, {}
        for name, plan in arrays.items():
            bases[name] = at
            at += plan.nbytes + GAP_BYTES
        regions = [
            region
            for number, plan in enumerate(self._arrays)
            for region in plan.regions(bases[plan.kind.pool or number])
        ]
        parallel = case.side(side).parallel
        split = TokenSplit(rank=place.cp, size=parallel.cp, interleave=parallel.interleave) if parallel.cp > 1 else None
        self.layout = KVLayout(tuple(regions), dtype="words", model=_model(case), groups=case.groups, split=split)
        self._words: U64 = np.frombuffer(self.memory.buffer, np.uint64)
        seed = np.random.default_rng([self._side, *place])
        counts = {region.group: region.pages for region in regions}
        self._pool_of = {kind.group: kind.pool or kind.group for kind in case.kinds} | {"": case.kinds[0].pool}
        self._free = {self._pool_of[group]: seed.permutation(count).tolist() for group, count in counts.items()}
        self._filler: U64 = filler(self._words.size, self._side)
        self._words[:] = self._filler

    def take(self, group: str, start: int, stop: int) -> Held:
        """Take pages for tokens [start, stop), in no particular order."""
        count = len(self.pages_of(group, start, stop))
        free = self._free.get(self._pool_of[group], [])
        if count > len(free):
            raise ValueError(f"{count} pages of group {group!r} are needed, {len(free)} are free: make the pool larger")
        self._free[self._pool_of[group]] = free[count:]
        return Held(group, start, stop, tuple(free[:count]))

    def pages_of(self, group: str, start: int, stop: int) -> range:
        """Return the pages of the request, by number, that hold this rank's tokens of [start, stop)."""
        first, last = self._place(group, start), self._place(group, stop)
        size = next((region.page_tokens for region in self.layout.regions if region.group == group), 0)
        return range(first // size, (last - 1) // size + 1) if size and last > first else range(0)

    def window(self, group: str, tokens: int) -> range:
        """Return the tokens that a group keeps of a request: the last ones, from the beginning of an element on."""
        kept = {one.name: one.window for one in self.layout.groups}[group] or tokens
        span = math.lcm(*(region.span for region in self.layout.regions if region.group == group))
        return range(max(0, tokens - kept) // span * span, tokens)

    @property
    def groups(self) -> list[str]:
        """The groups, except for the main one, of which this rank holds a part."""
        return sorted({region.group for region in self.layout.regions} - {""})

    def _place(self, group: str, token: int) -> int:
        """Return how many earlier tokens the rank holds: the index at which it keeps this one, if it does."""
        return int(self._tokens(group, token).size)

    def _tokens(self, group: str, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens before `stop` that the rank holds, in the order in which they lie."""
        tokens = np.arange(stop)
        split = self.layout.split
        if split is None or not split.interleave or any(one.name == group and one.window for one in self.layout.groups):
            return tokens
        held: npt.NDArray[np.int64] = tokens[tokens // split.interleave % split.size == split.rank]
        return held

    def give(self, held: Held) -> None:
        """Return the pages to the pool."""
        self._free[self._pool_of[held.group]] += held.pages

    def write(self, room: int, held: Sequence[Held]) -> None:
        """Write the KV of a request, as far as this rank holds it."""
        self._fill(self._words, room, held)

    def wipe(self, held: Sequence[Held]) -> None:
        """Overwrite these pages with filler, as if nothing had ever been written to them."""
        for piece in held:
            for region in self.layout.regions:
                if region.group == piece.group:
                    pages = np.asarray(piece.pages, np.int64)
                    now, then = (_view(image, region, self.memory.address) for image in (self._words, self._filler))
                    now[pages] = then[pages]

    def image(self, rooms: Mapping[int, Sequence[Held]]) -> U64:
        """Return the expected content of the whole memory if it holds these rooms completely, and nothing else."""
        image: U64 = self._filler.copy()
        for room, held in rooms.items():
            self._fill(image, room, held)
        return image

    def wrong_bytes(self, whole: Mapping[int, Sequence[Held]], partly: Mapping[int, Sequence[Held]]) -> list[str]:
        """Return where the memory is wrong, as text.

        Rooms of `whole` must be complete; of rooms of `partly`, any bytes may be present.
        """
        mine, with_all = self.image(whole), self.image({**whole, **partly})
        now: npt.NDArray[np.uint8] = self._words.view(np.uint8)
        wrong = (now != mine.view(np.uint8)) & (now != with_all.view(np.uint8))
        places = np.unique(np.flatnonzero(wrong) // WORD_BYTES)
        if not places.size:
            return []
        shown = [
            f"{self._where(int(p))}: {read(int(self._words[p]))}, not {read(int(mine[p]))}" for p in places[:_SHOWN]
        ]
        return [f"{int(wrong.sum())} bytes of {places.size} words are wrong", *shown]

    def close(self) -> None:
        """Free the memory."""
        del self._words
        self.memory.close()

    def _fill(self, image: U64, room: int, held: Sequence[Held]) -> None:
        for piece in held:
            for region in self.layout.regions:
                if region.group == piece.group:
                    self._fill_region(image, region, room, piece)

    def _fill_region(self, image: U64, region: KVRegion, room: int, piece: Held) -> None:
        first, last = (self._place(piece.group, token) for token in (piece.start, piece.stop))
        places = np.arange(first // region.span, -(-last // region.span)) * region.span
        page = places // region.page_tokens - first // region.page_tokens
        tokens = self._tokens(piece.group, piece.stop)[places].astype(np.uint64)
        view = _view(image, region, self.memory.address)
        view[np.asarray(piece.pages, np.int64)[page], places % region.page_tokens // region.span] = words(
            room=room % FILLER,
            layer=region.layer,
            component=COMPONENTS.index(region.component),
            token=tokens[:, None, None],
            head=np.arange(*region.head_range, dtype=np.uint64)[:, None],
            lane=np.arange(region.head_bytes // WORD_BYTES, dtype=np.uint64),
        )

    def _where(self, word: int) -> str:
        """Return the name of the element that lies at this word of the memory."""
        for region in self.layout.regions:
            numbers = np.full(self._words.size, -1, np.int64)
            view = _view(numbers, region, self.memory.address)
            view[:] = np.arange(view.size).reshape(view.shape)
            if numbers[word] >= 0:
                page, element, head, lane = np.unravel_index(int(numbers[word]), view.shape)
                return f"{region.name}, page {page}, element {element}, local head {head}, lane {lane}"
        return f"word {word}, which is in no region"


class _Array:
    """The array of one kind of component on one rank: its counts, its order in memory, its size."""

    def __init__(self, kind: Kind, side: Side, place: Place, tokens: int, requests: int) -> None:
        parallel = side.parallel
        self.kind = kind
        self.layers = _layers(kind, parallel, place)
        self.heads = msgspec.structs.replace(parallel, kv_heads=kind.heads).heads(place.tp)
        self.order = side.order
        page = side.group_pages.get(kind.group, side.page_tokens)
        self.counts = {
            "L": len(self.layers),
            "C": len(kind.components),
            "P": (tokens // page + 3 * requests) * 3 // 2 if page > 1 else 3 * requests,
            "T": page // kind.span,
            "H": self.heads[1] - self.heads[0],
            "D": kind.head_bytes,
        }
        self.nbytes = math.prod(self.counts.values())

    def regions(self, base: int) -> tuple[KVRegion, ...]:
        strides = {axis: math.prod(self.counts[i] for i in self.order[at + 1 :]) for at, axis in enumerate(self.order)}
        return array_regions(
            base,
            list(self.counts.values()),
            [strides[axis] for axis in self.counts],
            "".join(self.counts),
            itemsize=1,
            layers=self.layers,
            components=self.kind.components,
            first_head=self.heads[0],
            group=self.kind.group,
            span=self.kind.span,
            format=self.kind.format,
        )


def _layers(kind: Kind, parallel: Parallel, place: Place) -> list[int]:
    lo, hi = parallel.layers(place.pp) if parallel.stages else (0, 1 << 16)
    return [layer for layer in kind.layers if lo <= layer < hi]


def _model(case: Case) -> str:
    return ", ".join(f"{'+'.join(kind.components)} of {kind.heads} heads" for kind in case.kinds)


def _view(memory: npt.NDArray[np.uint64] | npt.NDArray[np.int64], region: KVRegion, address: int) -> U64:
    """Return [pages, elements of a page, heads, words] of a region, as a view of an image of the memory."""
    view: U64 = np.ndarray(
        (region.pages, region.page_tokens // region.span, region.heads, region.head_bytes // WORD_BYTES),
        memory.dtype,
        buffer=memory.data,
        offset=region.base - address,
        strides=(region.page_stride, region.token_stride, region.head_stride, WORD_BYTES),
    )
    return view

"""Whole hand-offs, drawn: a model, two engines that split it in their own ways, one decode rank and all that feed it.

How ranks split heads, layers and tokens is written down here once more, apart from `kvroom.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

from hypothesis import strategies as st

from kvroom.plan import KVGroup, KVLayout, KVRegion, TokenSplit, array_regions
from kvroom_lab import oracle


class Cache(NamedTuple):
    """One component of one layer, as the model has it."""

    component: str
    heads: int
    head_bytes: int
    group: str = ""
    span: int = 1
    format: str = ""
    whole: bool = False  # on every tensor rank with all heads


class Group(NamedTuple):
    window: int
    span: int  # windows begin at multiples of it


class Model(NamedTuple):
    layers: tuple[tuple[int, tuple[Cache, ...]], ...]
    groups: dict[str, Group]

    @property
    def span(self) -> int:
        """Return the tokens at whose multiples windows begin, in all groups without a window."""
        return math.lcm(*(group.span for group in self.groups.values() if not group.window))


class Engine(NamedTuple):
    """The way in which one side splits and stores the model."""

    tp: int
    heads_by: str  # see `rank_heads`
    stages: tuple[int, ...]  # where each pipeline stage ends, in layers
    split: tuple[int, int] | None  # ranks and interleave
    page_tokens: dict[str, int]
    axes: str
    padding: int
    spare: int
    step: int

    @property
    def cp(self) -> int:
        return self.split[0] if self.split else 1


class Send(NamedTuple):
    """Tokens [start, stop) of a group from one source; its page list begins at `begin`."""

    group: str
    start: int
    stop: int
    begin: int


class Rank:
    """A rank's layout, and its page lists: page i of the request is `page(i)` of the pool."""

    def __init__(self, layout: KVLayout, shift: int, step: int) -> None:
        self.layout, self.shift, self.step = layout, shift, step

    def __repr__(self) -> str:
        return f"Rank({self.layout!r}, {self.shift}, {self.step})"

    def pages(self, group: str, begin: int, stop: int) -> list[int]:
        """The page list of tokens [begin, stop)."""
        size = self.layout.table(group).pages
        numbers = oracle.page_numbers(self.layout, group, begin, stop)
        return [(self.shift + self.step * number) % size for number in numbers]


class HandOff(NamedTuple):
    """Several sources feed one target.

    `sends[i]` is what source i sends, `held[i]` the same in as few pieces as can be; `begins` is where the target's
    page lists begin.
    """

    model: Model
    source: Engine
    sink: Engine
    sources: list[Rank]
    target: Rank
    sends: list[list[Send]]
    held: list[list[Send]]
    windows: dict[str, tuple[int, int]]
    begins: dict[str, int]
    chunks: int


def rank_heads(heads: int, tp: int, rank: int, by: str) -> tuple[int, int]:
    """The half-open range of heads of one tensor rank: neighbours share heads, or the first ranks hold one more."""
    if heads < tp or by == "overlapping":
        return rank * heads // tp, -(-(rank + 1) * heads // tp)
    first = sum(heads // tp + (r < heads % tp) for r in range(rank))
    return first, first + heads // tp + (rank < heads % tp)


# Few draws make a hand-off cheap: each of these lists is drawn from once, and begins with the simplest.
SIZES = list(product([1, 2, 3, 4, 6, 5], [1, 2, 3]))  # heads, bytes of one
PAGE_SIZES = [1, 2, 3, 4, 6]
AXES = ["PTH", "PHT", "HPT", "LPTCH", "LPTHC", "PLCTH", "LCPHT", "PLTCH"]
STORING = list(product(AXES, [0, 0, 1], [0, 1], [1, -1, 2]))
SPLITS = [None, (2, 1), (2, 0), (3, 1), (2, 2), (4, 1), (3, 2), (3, 0), (2, 3)]  # (ranks, spans in each turn)
BACK = list(product([0, -1, 2, 4], [0, 3, 1]))
_window, _span, _draft = st.integers(2, 7), st.sampled_from([1, 2, 3]), st.booleans()
_sizes, _storing = st.sampled_from(SIZES), st.sampled_from(STORING)
_splits, _back = st.sampled_from(SPLITS), st.sampled_from(BACK)
_page_size, _length, _cuts = st.sampled_from(PAGE_SIZES), st.integers(0, 12), st.integers(0, 15)
_stages = {1: st.just((1,)), 2: st.sampled_from([(2,), (1, 2)]), 3: st.sampled_from([(3,), (1, 3), (2, 3), (1, 2, 3)])}


def layer_kind(kind: str, heads: int, lanes: int, span: int) -> tuple[Cache, ...]:
    """The caches of a layer."""
    k, v = Cache("k", heads, lanes), Cache("v", heads, lanes)
    if kind == "latent":
        return (Cache("latent", 1, lanes + 2, whole=True),)
    if kind == "scaled":
        return (k, v, Cache("k_scale", heads, 2, span=max(span, 2)))
    if kind == "compressed":
        return (Cache("latent", 1, lanes, whole=True), Cache("c4", 1, lanes, span=4, whole=True))
    if kind == "sliding":
        scales = (Cache("k_scale", heads, 2, span=span),) if span > 1 else ()
        return tuple(cache._replace(group="swa") for cache in (k, v, *scales))
    if kind == "state":
        return (Cache("conv", heads, 3, "state"), Cache("ssm", 2 * heads, lanes, "state"))
    if kind == "indexed":
        return (Cache("latent", 1, lanes, whole=True), Cache("index", 1, 2, "index", whole=True))
    if kind == "opaque":
        return (Cache("blob", 1, lanes, format="e4m3 with scales", whole=True),)
    if kind == "packed":
        return (Cache("page", 1, 5, "packed", 2, "swizzled", whole=True),)
    return (k, v)


def draw_model(draw: st.DrawFn, kinds: st.SearchStrategy[list[str]], drafts: bool) -> Model:
    """One to three layers, perhaps one of a draft model behind them."""
    drawn, (heads, lanes) = draw(kinds), draw(_sizes)
    span = draw(_span) if {"scaled", "sliding"} & set(drawn) else 1
    layers = [(number, layer_kind(kind, heads, lanes, span)) for number, kind in enumerate(drawn)]
    if drafts and draw(_draft):
        layers[-1] = (1000, layer_kind("full", 2, lanes, 1))
    windows = {"swa": draw(_window) if "sliding" in drawn else 0, "state": 1}
    groups: dict[str, Group] = {}
    for cache in (cache for _, caches in layers for cache in caches):
        group = groups.get(cache.group, Group(windows.get(cache.group, 0), 1))
        groups[cache.group] = group._replace(span=math.lcm(group.span, cache.span))
    return Model(tuple(layers), groups)


def draw_engine(draw: st.DrawFn, model: Model, widths: st.SearchStrategy[tuple[int, str]], tokens: bool) -> Engine:
    """One side of a hand-off."""
    tp, heads_by = draw(widths)
    axes, padding, spare, step = draw(_storing)
    drawn = draw(_splits) if tokens else None
    page_tokens = {
        name: 1 if group.window == 1 else 2 if name == "packed" else group.span * draw(_page_size)
        for name, group in model.groups.items()
    }
    stages = draw(_stages[len(model.layers)])
    split = (drawn[0], drawn[1] * model.span) if drawn else None
    return Engine(tp, heads_by, stages, split, page_tokens, axes, padding, spare, step)


class _Array(NamedTuple):
    layers: list[int]
    caches: list[Cache]
    heads: tuple[int, int]


def arrays(caches: Sequence[tuple[int, Cache]], engine: Engine, rank: int) -> list[_Array]:
    """Return the caches that one array holds: equal ones, if the engine keeps layers and components together."""
    found: list[_Array] = []
    for layer, cache in caches:
        heads = (0, cache.heads) if cache.whole else rank_heads(cache.heads, engine.tp, rank, engine.heads_by)
        found.append(_Array([layer], [cache], heads))
    if "L" not in engine.axes:
        return found
    kinds: dict[tuple[object, ...], dict[int, list[_Array]]] = {}
    for one in found:
        alike = one.caches[0]._replace(component=""), one.heads
        kinds.setdefault(alike, {}).setdefault(one.layers[0], []).append(one)
    joined = []
    for by_layer in kinds.values():
        components = [[one.caches[0].component for one in some] for some in by_layer.values()]
        if all(names == components[0] for names in components):
            some = next(iter(by_layer.values()))
            joined.append(_Array(list(by_layer), [one.caches[0] for one in some], some[0].heads))
        else:
            joined += [one for some in by_layer.values() for one in some]
    return joined


def make_layout(model: Model, engine: Engine, place: tuple[int, int, int], pages: dict[str, int]) -> KVLayout:
    """The layout of the rank at (tensor, pipeline, context)."""
    tp, pp, cp = place
    first = engine.stages[pp - 1] if pp else 0
    caches = [(layer, cache) for layer, some in model.layers[first : engine.stages[pp]] for cache in some]
    regions: list[KVRegion] = []
    end = 0
    for array in arrays(caches, engine, tp):
        cache = array.caches[0]
        sizes = {
            "L": len(array.layers),
            "C": len(array.caches),
            "P": pages[cache.group],
            "T": engine.page_tokens[cache.group] // cache.span,
            "H": array.heads[1] - array.heads[0],
            "D": cache.head_bytes,
        }
        axes = engine.axes + "D"
        strides = [1]
        for axis in axes[:0:-1]:
            strides.insert(0, strides[0] * sizes[axis] + (engine.padding if axis != "D" else 0))
        regions += array_regions(
            end,
            [sizes[axis] for axis in axes],
            strides,
            axes,
            itemsize=1,
            layers=array.layers,
            components=[one.component for one in array.caches],
            first_head=array.heads[0],
            group=cache.group,
            span=cache.span,
            format=cache.format,
        )
        end += strides[0] * sizes[axes[0]]
    groups = tuple(KVGroup(name=name, window=group.window) for name, group in model.groups.items() if name)
    split = TokenSplit(rank=cp, size=engine.cp, interleave=engine.split[1]) if engine.split else None
    return KVLayout(tuple(regions), "int8", groups=groups, split=split)


def make_rank(
    model: Model, engine: Engine, place: tuple[int, int, int], begins: dict[str, int], stop: int, shift: int
) -> Rank:
    """The rank, with pools as large as its longest page list and the spare pages, in which no page comes twice."""
    pages = {}
    for name, begin in begins.items():
        size = engine.page_tokens[name]
        count = -(-stop // size) - begin // size + engine.spare + 1
        pages[name] = count + (engine.step == 2 and count % 2 == 0)
    return Rank(make_layout(model, engine, place, pages), shift, engine.step)


def feeding(model: Model, source: Engine, sink: Engine, place: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Places of the source ranks that share heads with a sink rank, and of the first rank, which may share nothing."""
    first = sink.stages[place[1] - 1] if place[1] else 0
    wanted = [cache for _, caches in model.layers[first : sink.stages[place[1]]] for cache in caches]
    found = []
    for rank in range(source.tp):
        for cache in wanted:
            ours = rank_heads(cache.heads, source.tp, rank, source.heads_by)
            theirs = rank_heads(cache.heads, sink.tp, place[0], sink.heads_by)
            if rank == 0 or cache.whole or max(ours[0], theirs[0]) < min(ours[1], theirs[1]):
                found.append(rank)
                break
    return [(tp, pp, cp) for cp in range(source.cp) for tp in found for pp in range(len(source.stages))]


def sends_of(
    model: Model, windows: dict[str, tuple[int, int]], cuts: list[int], owner: tuple[int, int] | None, back: int
) -> list[Send]:
    """Return the sends of one rank: every chunk, or only each `owner[1]`-th from `owner[0]` on.

    Windows come with the last chunk, so among ranks that scatter the tokens the one with the last tokens sends them.
    Page lists begin `back` tokens before the window; with a negative `back` each at its own chunk.
    """
    found = []
    for name, (start, stop) in windows.items():
        if model.groups[name].window:
            if owner is None or len(cuts) % owner[1] == owner[0]:
                found.append(Send(name, start, stop, max(0, start - max(back, 0))))
            continue
        borders = [start, *cuts, stop]
        for number, (begin, end) in enumerate(pairwise(borders)):
            mine = owner is None or number % owner[1] == owner[0]
            alone = owner is not None or back < 0
            if mine:
                found.append(Send(name, begin, end, begin if alone else max(0, start - back)))
    return found


@st.composite
def hand_offs(
    draw: st.DrawFn,
    kinds: st.SearchStrategy[list[str]],
    widths: st.SearchStrategy[tuple[int, str]],
    tokens: bool,
    drafts: bool,
) -> HandOff:
    """Any hand-off to one decode rank of a request of at most some 20 tokens."""
    model = draw_model(draw, kinds, drafts)
    source, sink = draw_engine(draw, model, widths, tokens), draw_engine(draw, model, widths, tokens)
    span = model.span
    start = span * draw(st.integers(0, 8 // span))
    stop = start + draw(_length)
    mask = draw(_cuts)
    borders = [cut for i in range(4) if mask >> i & 1 and start < (cut := (start // span + 1 + i) * span) < stop]
    windows = {
        name: (max(0, stop - group.window) // group.span * group.span if group.window else start, stop)
        for name, group in model.groups.items()
    }
    back, target_back = draw(_back)
    begins = {name: max(0, window[0] - target_back) for name, window in windows.items()}
    source_begins = {name: max(0, window[0] - max(back, 0)) for name, window in windows.items()}
    place = draw(st.sampled_from(list(product(range(sink.tp), range(len(sink.stages)), range(sink.cp)))))
    places = feeding(model, source, sink, place)
    turn = draw(st.integers(0, len(places) - 1))
    places = places[turn:] + places[:turn]
    scattered = source.split is not None and source.split[1] == 0
    owners = [(at[2], source.cp) if scattered else None for at in places]
    sends = [sends_of(model, windows, borders, owner, back) for owner in owners]
    whole = sends_of(model, windows, [], None, back)
    return HandOff(
        model,
        source,
        sink,
        [make_rank(model, source, at, source_begins, stop, number) for number, at in enumerate(places)],
        make_rank(model, sink, place, begins, stop, 1),
        sends,
        sends if scattered else [whole] * len(places),
        windows,
        begins,
        len(borders) + 1,
    )


def kinds_of(one: HandOff) -> set[str]:
    """Return the features that occur in a hand-off, for counting."""
    sharded = [cache for _, caches in one.model.layers for cache in caches if not cache.whole]
    names = {cache.component for _, caches in one.model.layers for cache in caches}
    groups = one.model.groups.keys()
    sizes = [(one.source.page_tokens[name], one.sink.page_tokens[name]) for name in groups]
    head_major = ["PHT" in engine.axes or "HPT" in engine.axes for engine in (one.source, one.sink)]
    start, stop = next(iter(one.windows.values()))
    tp = one.source.tp
    ours, theirs = one.source.split or (1, 0), one.sink.split or (1, 0)
    facts = {
        "wider sink": one.source.tp < one.sink.tp,
        "wider source": one.source.tp > one.sink.tp,
        "eight ranks": max(one.source.tp, one.sink.tp) == 8,
        "replicated heads": any(cache.heads < tp for cache in sharded),
        "heads that do not divide": any(cache.heads > tp and cache.heads % tp for cache in sharded),
        "pipeline stages on both sides": len(one.source.stages) > 1 and len(one.sink.stages) > 1,
        "stages cut elsewhere": one.source.stages != one.sink.stages,
        "source interleaves tokens": ours[1] > 0,
        "sink interleaves tokens": theirs[1] > 0,
        "both interleave, in other ways": ours[1] > 0 and theirs[1] > 0 and ours != theirs,
        "both interleave alike": ours[1] > 0 and ours == theirs,
        "source sends scattered tokens": ours[0] > 1 and ours[1] == 0,
        "one page size is a multiple": any(a != b and (a % b == 0 or b % a == 0) for a, b in sizes),
        "no page size is a multiple": any(a % b and b % a for a, b in sizes),
        "head-major to token-major": head_major[0] and not head_major[1],
        "token-major to head-major": head_major[1] and not head_major[0],
        "keys beside values": "C" in one.source.axes or "C" in one.sink.axes,
        "one allocation": one.source.axes[0] == "P" and "L" in one.source.axes,
        "latent": "latent" in names,
        "scales": "k_scale" in names,
        "compressed": "c4" in names,
        "window": "swa" in groups,
        "state": "state" in groups,
        "second page table": "index" in groups,
        "opaque": "blob" in names,
        "opaque pages": "page" in names,
        "draft": any(layer >= 1000 for layer, _ in one.model.layers),
        "prefix": start > 0,
        "nothing to move": start == stop,
        "chunks": one.chunks > 1,
        "several sources": len(one.sources) > 1,
    }
    return {name for name, true in facts.items() if true}

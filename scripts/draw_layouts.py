"""Draw docs/layouts/*.svg from plans and write their figures into docs/layouts.md. `--check` only compares.

Run: python scripts/draw_layouts.py [--check]

Each drawing, and the numbers below it, come from real layouts and from the blocks that a `Planner` returns for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from strip_chart import Cell, Chart, Move, Strip, draw

from kvroom.plan import Blocks, KVGroup, KVLayout, KVRegion, Planner, TokenSplit, array_regions, shares
from kvroom.plan.ranks import Parallel, Place, match_ranks

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "layouts.md"
HEAD_BYTES = 256  # a head of 128 lanes in bf16
LATENT_BYTES = 1152  # MLA: 512 lanes of latent and 64 of rope, in bf16
APART = 1 << 40  # arrays of a drawing start at multiples of this, so that no two are adjacent
KV = ("k", "v")
Links = Container[tuple[int, int]]  # source number, sink number


@dataclass(frozen=True)
class Send:
    """Tokens [start, stop) of the request, and the pages of one group that hold them."""

    start: int
    stop: int
    pages: Sequence[int]
    group: str = ""


@dataclass(frozen=True)
class Rank:
    """One rank: its pool, and the pages of the request in it."""

    title: str
    layout: KVLayout
    sends: Sequence[Send]


@dataclass(frozen=True)
class Cut:
    """The cells of a drawing: the number of tokens in each, of one head or of all heads, and the name of their page."""

    tokens: int
    by_head: bool = False
    name: str = "layer {layer} {component} · page {page}"


def array(
    number: int,
    pages: int,
    page_tokens: int,
    *,
    heads: tuple[int, int] = (0, 1),
    layers: Sequence[int] = (0,),
    components: Sequence[str] = KV,
    head_bytes: int = HEAD_BYTES,
    memory: str = "LCPTHD",
    group: str = "",
) -> tuple[KVRegion, ...]:
    """Return the regions of an array with its axes in this order in memory. Each `number` has its own addresses."""
    counts = {"L": len(layers), "C": len(components), "P": pages, "T": page_tokens, "H": heads[1] - heads[0]}
    counts["D"] = head_bytes
    strides = [prod(counts[inner] for inner in memory[memory.index(axis) + 1 :]) for axis in counts]
    return array_regions(
        (number + 1) * APART,
        list(counts.values()),
        strides,
        "".join(counts),
        itemsize=1,
        layers=layers,
        components=components,
        first_head=heads[0],
        group=group,
    )


def layout(*regions: Sequence[KVRegion], groups: Sequence[KVGroup] = (), split: TokenSplit | None = None) -> KVLayout:
    """Return one rank's layout of these arrays."""
    flat = tuple(region for array in regions for region in array)
    return KVLayout(flat, dtype="bfloat16", groups=tuple(groups), split=split)


# -- plans ------------------------------------------------------------------------------------------------------------


def plans(sources: Sequence[Rank], sink: Rank) -> Iterator[tuple[int, list[Blocks] | None]]:
    """Yield the number of each source and the blocks that it writes to the sink; None if it writes nothing."""
    for number, parts in enumerate(shares([source.layout for source in sources], sink.layout)):
        if parts == ():
            yield number, None
        elif parts is None or parts:
            planner = Planner(sources[number].layout, sink.layout, parts)
            yield number, [_blocks(planner, send, sink) for send in sources[number].sends]


def _blocks(planner: Planner, send: Send, sink: Rank) -> Blocks:
    into = next(offer for offer in sink.sends if offer.group == send.group)
    pages = into.pages[: sink.layout.window_pages(into.start, send.stop, send.group)]
    return planner.copies(
        send.pages, pages, send.start, send.stop, source_start=send.start, target_start=into.start, group=send.group
    )


def chart(title: str, sources: Sequence[Rank], sinks: Sequence[Rank], cut: Cut, linked: Links = ()) -> Chart:
    """Return the drawing of these plans. Sources that write nothing and are `linked` are drawn as reporting."""
    moves: list[Move] = []
    reports = []
    for to, sink in enumerate(sinks):
        for number, planned in plans(sources, sink):
            if planned is None and (number, to) in linked:
                reports.append((number, to))
            for blocks in planned or ():
                rows = zip(*(column.tolist() for column in blocks), strict=True)
                moves += [Move(number, to, src, dst, nbytes) for src, dst, nbytes in rows]
    note = f"From the plan: {amount([move.nbytes for move in moves])}."
    strips = [_strip(rank, cut) for rank in sources], [_strip(rank, cut) for rank in sinks]
    return Chart(title, note, *strips, moves, reports)


def amount(sizes: Sequence[int]) -> str:
    """Return the number of blocks, their sizes and the bytes in all, as text."""
    least, most = min(sizes), max(sizes)
    each = unit(least) if least == most else f"{unit(least)} to {unit(most)}"
    return f"{len(sizes):,} {'block' if len(sizes) == 1 else 'blocks'} of {each}, {unit(sum(sizes))} in all"


def unit(nbytes: int) -> str:
    """Return a number of bytes in the largest unit of which it is at least one."""
    for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {name}"
    return f"{nbytes} B"


# -- cells ------------------------------------------------------------------------------------------------------------


def _strip(rank: Rank, cut: Cut) -> Strip:
    cells = [
        cell
        for region in rank.layout.regions
        for page in range(region.pages)
        for cell in _cells(rank, region, page, cut)
    ]
    return Strip(rank.title, sorted(cells, key=lambda cell: cell.address))


def _cells(rank: Rank, region: KVRegion, page: int, cut: Cut) -> Iterator[Cell]:
    name = cut.name.format(layer=region.layer, component=region.component, page=page, group=region.group)
    tokens = min(cut.tokens, region.page_tokens)
    for token in range(0, region.page_tokens, tokens):
        for head in range(region.heads if cut.by_head else 1):
            address = region.base + page * region.page_stride + token * region.token_stride + head * region.head_stride
            label = _label(rank, region, page, token, tokens)
            if cut.by_head and label:
                label = (*label, f"h{region.head_range[0] + head}")
            yield Cell(address, tokens * region.head_bytes * (1 if cut.by_head else region.heads), label, name)


def _label(rank: Rank, region: KVRegion, page: int, token: int, count: int) -> tuple[str, ...]:
    """Return the tokens of the request in this cell, as text; nothing if another request may use the cell."""
    for send in rank.sends:
        if send.group != region.group or page not in send.pages:
            continue
        if rank.layout.table(send.group).window == 1:
            return ("state",)
        begin = send.start // region.page_tokens * region.page_tokens
        first = _token(rank.layout.split, begin + list(send.pages).index(page) * region.page_tokens + token)
        last = min(first + count, send.stop) - 1
        if max(first, send.start) <= last:
            return (f"t{first}",) if count == 1 else (f"{max(first, send.start)}-{last}",)
    return ()


def _token(split: TokenSplit | None, place: int) -> int:
    """Return the token at this place of a rank's packed tokens."""
    if split is None or not split.interleave:
        return place
    rounds, rest = divmod(place, split.interleave)
    return (rounds * split.size + split.rank) * split.interleave + rest


# -- the drawings -----------------------------------------------------------------------------------------------------


def tensor_parallel(memory: str, words: str) -> Chart:
    """Draw four KV heads over two ranks, then over four; one page of four tokens."""

    def rank(side: str, number: int, size: int) -> Rank:
        heads = number * 4 // size, (number + 1) * 4 // size
        pool = layout(array(number, 1, 4, heads=heads, components=("k",), memory=memory))
        return Rank(f"{side}, tp {number}", pool, [Send(0, 4, [0])])

    return chart(
        f"TP 2 to TP 4, {words}",
        [rank("prefill", number, 2) for number in range(2)],
        [rank("decode", number, 4) for number in range(4)],
        Cut(1, by_head=True, name="layer 0 k · page 0"),
    )


def pipeline() -> Chart:
    """Draw four layers over two stages, then on one rank; two pages of 16 tokens."""
    cut = Cut(16, name="L{layer} {component}")
    sources = [
        Rank(
            f"prefill, pp {stage}: layers {2 * stage} and {2 * stage + 1}",
            layout(array(stage, 3, 16, heads=(0, 2), layers=range(2 * stage, 2 * stage + 2))),
            [Send(0, 32, pages)],
        )
        for stage, pages in enumerate(([2, 0], [1, 2]))
    ]
    sink = Rank("decode: layers 0 to 3", layout(array(9, 3, 16, heads=(0, 2), layers=range(4))), [Send(0, 32, [0, 2])])
    return chart("PP 2 to PP 1", sources, [sink], cut)


def page_sizes() -> Chart:
    """Draw pages of 64 tokens, then of 16; 104 tokens of the request."""
    source = Rank(
        "prefill, pages of 64 tokens",
        layout(array(0, 3, 64, components=("k",))),
        [Send(0, 104, [2, 0])],
    )
    sink = Rank(
        "decode, pages of 16 tokens",
        layout(array(9, 10, 16, components=("k",))),
        [Send(0, 104, [3, 4, 0, 7, 8, 1, 6])],
    )
    return chart("Page 64 to page 16", [source], [sink], Cut(16, name="page {page}"))


def latent() -> Chart:
    """Draw the same latent on each of four ranks; two pages of four tokens."""
    sources = [
        Rank(
            f"prefill, tp {number}",
            layout(array(number, 3, 4, components=("latent",), head_bytes=LATENT_BYTES)),
            [Send(0, 8, pages)],
        )
        for number, pages in enumerate(([1, 2], [0, 2], [2, 0], [0, 1]))
    ]
    sink = Rank(
        "decode, tp 0", layout(array(9, 4, 4, components=("latent",), head_bytes=LATENT_BYTES)), [Send(0, 8, [3, 1])]
    )
    asked = match_ranks(Parallel(tp=4), Parallel()).sources(Place(0, 0, 0, 0))
    linked = [(place.tp, 0) for place in asked]
    return chart(
        "MLA, TP 4 to TP 1: one writes, the others only report", sources, [sink], Cut(4, name="page {page}"), linked
    )


def interleaved() -> Chart:
    """Draw tokens that are dealt to two ranks in turn and packed into their pages, then all on one rank."""

    def pool(number: int, pages: int, split: TokenSplit | None) -> KVLayout:
        return layout(array(number, pages, 4, components=("latent",), head_bytes=LATENT_BYTES), split=split)

    sources = [
        Rank(
            f"prefill, cp {number}",
            pool(number, 2, TokenSplit(rank=number, size=2, interleave=1)),
            [Send(0, 15, pages)],
        )
        for number, pages in enumerate(([0, 1], [1, 0]))
    ]
    sink = Rank("decode, all tokens", pool(9, 5, None), [Send(0, 15, [4, 0, 2, 3])])
    return chart("CP 2 to CP 1, interleaved (DCP, interleave 1)", sources, [sink], Cut(1, name="page {page}"))


def zigzag() -> Chart:
    """Draw tokens in four pieces, the outer ones on one rank; each send states which tokens it brings."""
    sources = [
        Rank(
            f"prefill, cp {number}",
            layout(array(number, 5, 16, heads=(0, 2), components=("k",)), split=TokenSplit(rank=number, size=2)),
            sends,
        )
        for number, sends in enumerate(
            ([Send(0, 32, [1, 2]), Send(96, 120, [4, 0])], [Send(32, 64, [0, 3]), Send(64, 96, [2, 4])])
        )
    ]
    sink = Rank(
        "decode, all tokens",
        layout(array(9, 10, 16, heads=(0, 2), components=("k",))),
        [Send(0, 120, [8, 0, 1, 3, 2, 6, 7, 5])],
    )
    return chart("CP 2 to CP 1, zigzag: each send names its tokens", sources, [sink], Cut(16, name="page {page}"))


def hybrid() -> Chart:
    """Draw a full layer, a sliding-window layer and a state layer, each with its own page table."""
    groups = KVGroup(name="swa", window=32), KVGroup(name="state", window=1)

    def rank(title: str, number: int, full: list[int], swa: list[int], slot: int) -> Rank:
        pool = layout(
            array(number, 6, 16, components=("k",)),
            array(number + 1, 4, 16, components=("k",), layers=[1], group="swa"),
            array(number + 2, 3, 1, components=("ssm",), layers=[2], head_bytes=4096, group="state"),
            groups=groups,
        )
        return Rank(title, pool, [Send(0, 72, full), Send(40, 72, swa, "swa"), Send(71, 72, [slot], "state")])

    return chart(
        "Hybrid: a full layer, a sliding window of 32, one state; 72 tokens",
        [rank("prefill", 0, [0, 1, 3, 2, 5], [1, 3, 0], 2)],
        [rank("decode", 10, [2, 4, 0, 5, 3], [0, 2, 1], 0)],
        Cut(16, name="L{layer} {component} · p{page}"),
    )


DRAWINGS: dict[str, Callable[[], Chart]] = {
    "tp2-tp4-nhd": lambda: tensor_parallel("LCPTHD", "NHD: token by token"),
    "tp2-tp4-hnd": lambda: tensor_parallel("LCPHTD", "HND: head by head"),
    "pp2-pp1": pipeline,
    "page64-page16": page_sizes,
    "mla-tp4-tp1": latent,
    "cp2-cp1-interleaved": interleaved,
    "cp2-cp1-zigzag": zigzag,
    "hybrid": hybrid,
}


# -- the same at full size --------------------------------------------------------------------------------------------

TOKENS = 4096
LAYERS = range(80)
HEADS = 8


def full_size() -> Iterator[tuple[str, list[int]]]:
    """Yield each transfer of one request of 4,096 tokens with the sizes of its blocks, for all sinks together."""
    for words, sources, sinks in _full_size_engines():
        sizes = [
            int(nbytes)
            for sink in sinks
            for _, planned in plans(sources, sink)
            for blocks in planned or ()
            for nbytes in blocks.length
        ]
        yield words, sizes


def _full_size_engines() -> Iterator[tuple[str, list[Rank], list[Rank]]]:
    yield "TP 4 to TP 4", _tp(4, 16), _tp(4, 16, 10)
    yield "TP 2 to TP 4, NHD", _tp(2, 16), _tp(4, 16, 10)
    yield "TP 2 to TP 4, HND", _tp(2, 16, memory="LCPHTD"), _tp(4, 16, 10, memory="LCPHTD")
    yield "TP 4 to TP 4, HND to NHD", _tp(4, 16, memory="LCPHTD"), _tp(4, 16, 10)
    yield "PP 2 to PP 1", [_full(i, 16, layers=LAYERS[40 * i : 40 * i + 40]) for i in range(2)], [_full(10, 16)]
    yield "page 64 to page 16", [_full(0, 64)], [_full(10, 16)]
    yield "MLA, TP 4 to TP 1", [_full_latent(i) for i in range(4)], [_full_latent(10)]
    split = [TokenSplit(rank=i, size=2, interleave=1) for i in range(2)]
    yield "MLA, CP 2 to CP 1, interleave 1", [_full_latent(i, split[i]) for i in range(2)], [_full_latent(10)]
    split = [TokenSplit(rank=i, size=2, interleave=64) for i in range(2)]
    yield "MLA, CP 2 to CP 1, interleave 64", [_full_latent(i, split[i]) for i in range(2)], [_full_latent(10)]


def _tp(size: int, page_tokens: int, first: int = 0, memory: str = "LCPTHD") -> list[Rank]:
    heads = [(i * HEADS // size, (i + 1) * HEADS // size) for i in range(size)]
    return [_full(first + i, page_tokens, heads=heads[i], memory=memory) for i in range(size)]


def _full(
    number: int,
    page_tokens: int,
    *,
    heads: tuple[int, int] = (0, HEADS),
    layers: Sequence[int] = LAYERS,
    memory: str = "LCPTHD",
) -> Rank:
    pool = layout(array(number, 1024, page_tokens, heads=heads, layers=layers, memory=memory))
    return _scattered(number, pool)


def _full_latent(number: int, split: TokenSplit | None = None) -> Rank:
    pool = array(number, 1024, 64, layers=range(61), components=("latent",), head_bytes=LATENT_BYTES)
    return _scattered(number, layout(pool, split=split))


def _scattered(number: int, pool: KVLayout) -> Rank:
    """Place the request in pages that never follow each other, as in a pool that has been in use for a long time."""
    pages = np.random.default_rng(number).permutation(512)[: pool.window_pages(0, TOKENS)] * 2
    return Rank("", pool, [Send(0, TOKENS, pages.tolist())])


# -- the page ---------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return the table of `full_size`."""
    rows = ["| transfer | blocks | bytes of a block | bytes in all |", "| --- | ---: | ---: | ---: |"]
    for words, sizes in full_size():
        assert min(sizes) == max(sizes), f"{words}: blocks of several sizes"
        rows.append(f"| {words} | {len(sizes):,} | {unit(sizes[0])} | {unit(sum(sizes))} |")
    return "\n".join(rows)


def filled(text: str, charts: dict[str, Chart]) -> str:
    """Return the page with each drawing, its title and figures, and the table, between their marks."""
    parts = {name: f"![{one.title}](layouts/{name}.svg)\n\n*{one.note}*" for name, one in charts.items()}
    parts["full-size"] = table()
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"docs/layouts.md must have {begin.strip()} and {end} once each, on lines of their own")
        text = text[: text.index(begin)] + f"{begin}{part}\n" + text[text.index(end) :]
    return text


def main() -> int:
    charts = {name: make() for name, make in DRAWINGS.items()}
    wanted = {DOCS / "layouts" / f"{name}.svg": draw(one) for name, one in charts.items()}
    wanted[PAGE] = filled(PAGE.read_text(), charts)
    if sys.argv[1:] == ["--check"]:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        extra = set((DOCS / "layouts").iterdir()) - set(wanted)
        return int(bool(stale or extra))
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

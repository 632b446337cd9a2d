"""The cases: pairs of engines that split one model differently, and the requests that go between them.

The law: a case is data. It describes how each side lays out its cache, and not which bytes should move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import msgspec

from kvroom.plan import KVGroup
from kvroom.plan.ranks import Parallel, Place

SideName = Literal["source", "sink"]
NHD = "LCPTHD"
HND = "LCPHTD"
TOKEN_MAJOR = "PTLCHD"  # everything of one token is contiguous
PAGE_MAJOR = "PLCTHD"  # all layers of one page are contiguous


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """Components that some layers have in the same form.

    `heads` 0 means one head that every tensor rank holds (a latent). Kinds with the same `pool`, in different groups
    and with the same number of layers, lie in one array, where each page belongs to one of them.
    """

    components: tuple[str, ...] = ("k", "v")
    layers: tuple[int, ...] = (0, 1, 2, 3)
    heads: int = 4
    head_bytes: int = 32
    span: int = 1
    group: str = ""
    format: str = ""
    pool: str = ""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """The layout of an engine's cache. `group_pages`: tokens of a page, for groups that differ from the main one."""

    parallel: Parallel = Parallel()
    page_tokens: int = 16
    group_pages: dict[str, int] = {}
    order: str = NHD
    zigzag: bool = False  # with cp: the request is cut into 2 cp pieces, otherwise into cp
    chunks: tuple[float, ...] = ()  # where the engine cuts what it sends, as fractions of the request


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Two engines.

    `requests` has pairs of tokens and `decode_prefix_len`; each is a room, all open at the same time.
    """

    name: str
    source: Side
    sink: Side
    kinds: tuple[Kind, ...] = (Kind(),)
    groups: tuple[KVGroup, ...] = ()
    requests: tuple[tuple[int, int], ...] = ((77, 0), (64, 32), (1, 0), (40, 40))

    def side(self, name: SideName) -> Side:
        return self.source if name == "source" else self.sink

    @property
    def ranks(self) -> int:
        """Return the number of processes that the case needs."""
        return self.source.parallel.group + self.sink.parallel.group


class Piece(NamedTuple):
    """Tokens [start, stop) of a request that a rank sends in one step, or is offered."""

    start: int
    stop: int


def pieces(side: Side, place: Place, tokens: int) -> list[Piece]:
    """Return the tokens that a rank sends, in its order. The last piece ends with the request, and may be empty."""
    parallel, size = side.parallel, side.parallel.cp
    held = [Piece(0, tokens)]
    if size > 1 and not parallel.interleave:
        parts = 2 * size if side.zigzag else size
        cut = [tokens * i // parts for i in range(parts + 1)]
        mine = [place.cp, parts - 1 - place.cp] if side.zigzag else [place.cp]
        held = [Piece(cut[i], cut[i + 1]) for i in mine]
    chunked = [piece for one in held for piece in _chunks(one, side.chunks, tokens)]
    return chunked if chunked and chunked[-1].stop == tokens else [*chunked, Piece(tokens, tokens)]


def _chunks(piece: Piece, parts: Sequence[float], tokens: int) -> Iterator[Piece]:
    borders = [border for border in (int(tokens * part) for part in parts) if piece.start < border < piece.stop]
    for start, stop in zip([piece.start, *borders], [*borders, piece.stop], strict=True):
        if start < stop:
            yield Piece(start, stop)


def _engine(heads: int = 4, **options: object) -> Side:
    """Return a side. Options that a parallel description has go there, the others to the side itself."""
    known = {name: options.pop(name) for name in ("tp", "pp", "cp", "stages", "interleave") if name in options}
    parallel = msgspec.convert({"kv_heads": heads} | known, Parallel)
    return msgspec.convert(options | {"parallel": parallel}, Side)


_LATENT = Kind(components=("latent",), heads=0, head_bytes=72)
_HYBRID = (
    Kind(layers=(0, 2)),
    Kind(layers=(1, 3), group="swa"),
    Kind(layers=(4,), components=("ssm",), head_bytes=640, group="state"),
    Kind(layers=(4,), components=("conv",), head_bytes=96, group="state"),
)
_HYBRID_GROUPS = (KVGroup(name="swa", window=40), KVGroup(name="state", window=1))
_SCALES = (Kind(), Kind(components=("k_scale",), head_bytes=8, span=8))

CASES = (
    Case(name="tp1-tp1", source=_engine(), sink=_engine()),
    Case(name="tp1-tp2", source=_engine(), sink=_engine(tp=2)),
    Case(name="tp2-tp1", source=_engine(tp=2, chunks=(0.3, 0.7)), sink=_engine()),
    Case(name="tp2-tp4", source=_engine(tp=2), sink=_engine(tp=4)),
    Case(name="tp4-tp2", source=_engine(tp=4), sink=_engine(tp=2)),
    Case(name="3-heads-tp2-tp4", kinds=(Kind(heads=3),), source=_engine(3, tp=2), sink=_engine(3, tp=4)),
    Case(name="3-heads-tp4-tp2", kinds=(Kind(heads=3),), source=_engine(3, tp=4), sink=_engine(3, tp=2)),
    Case(name="2-heads-tp4-tp4", kinds=(Kind(heads=2),), source=_engine(2, tp=4), sink=_engine(2, tp=4)),
    Case(name="pp2-pp1", source=_engine(pp=2, stages=(3, 1)), sink=_engine(stages=(4,))),
    Case(name="pp1-pp2", source=_engine(stages=(4,)), sink=_engine(pp=2, stages=(2, 2))),
    Case(
        name="pp2tp2-pp2tp1",
        source=_engine(pp=2, tp=2, stages=(1, 3)),
        sink=_engine(pp=2, stages=(2, 2)),
    ),
    Case(
        name="pp2tp1-pp2tp2",
        source=_engine(pp=2, stages=(2, 2)),
        sink=_engine(pp=2, tp=2, stages=(2, 2)),
    ),
    Case(name="cp2-cp1-interleave-1", source=_engine(cp=2, interleave=1), sink=_engine()),
    Case(name="cp2-cp1-interleave-8", source=_engine(cp=2, interleave=8, chunks=(0.5,)), sink=_engine(page_tokens=8)),
    Case(name="cp1-cp2-interleave-1", source=_engine(), sink=_engine(cp=2, interleave=1)),
    Case(name="cp2-cp3-interleaves-4-and-2", source=_engine(cp=2, interleave=4), sink=_engine(cp=3, interleave=2)),
    Case(name="cp2-cp1-halves", source=_engine(cp=2), sink=_engine()),
    Case(name="cp2-cp1-zigzag", source=_engine(cp=2, zigzag=True, chunks=(0.1, 0.6)), sink=_engine()),
    Case(name="cp2-zigzag-cp2-interleave-1", source=_engine(cp=2, zigzag=True), sink=_engine(cp=2, interleave=1)),
    Case(name="mla-tp4-tp1", kinds=(_LATENT,), source=_engine(0, tp=4), sink=_engine(0)),
    Case(name="mla-tp2-tp4", kinds=(_LATENT,), source=_engine(0, tp=2), sink=_engine(0, tp=4)),
    Case(
        name="mla-tp2cp2-tp1",
        kinds=(_LATENT,),
        source=_engine(0, tp=2, cp=2, interleave=1),
        sink=_engine(0, page_tokens=64),
    ),
    Case(name="page64-page16", source=_engine(page_tokens=64), sink=_engine(page_tokens=16)),
    Case(name="page16-page64", source=_engine(page_tokens=16), sink=_engine(page_tokens=64)),
    Case(name="page48-page32", source=_engine(page_tokens=48, chunks=(0.4,)), sink=_engine(page_tokens=32)),
    Case(name="hnd-nhd", source=_engine(order=HND), sink=_engine(order=NHD)),
    Case(
        name="token-major-page-major-tp2-tp1",
        source=_engine(order=TOKEN_MAJOR, tp=2),
        sink=_engine(order=PAGE_MAJOR),
    ),
    Case(
        name="hybrid-tp2-tp1",
        kinds=_HYBRID,
        groups=_HYBRID_GROUPS,
        source=_engine(tp=2, group_pages={"swa": 16, "state": 1}),
        sink=_engine(page_tokens=32, group_pages={"swa": 8, "state": 1}),
    ),
    Case(
        name="hybrid-tp1-tp2",
        kinds=_HYBRID,
        groups=_HYBRID_GROUPS,
        source=_engine(group_pages={"swa": 8, "state": 1}, chunks=(0.5,)),
        sink=_engine(tp=2, group_pages={"swa": 16, "state": 1}),
    ),
    Case(
        name="hybrid-cp2-cp1-halves",
        kinds=_HYBRID,
        groups=_HYBRID_GROUPS,
        source=_engine(cp=2, group_pages={"swa": 8, "state": 1}),
        sink=_engine(group_pages={"swa": 16, "state": 1}),
    ),
    Case(
        name="hybrid-cp2-cp1-zigzag",
        kinds=_HYBRID,
        groups=_HYBRID_GROUPS,
        source=_engine(cp=2, zigzag=True, group_pages={"swa": 16, "state": 1}),
        sink=_engine(group_pages={"swa": 16, "state": 1}),
    ),
    Case(
        name="hybrid-cp2-cp1-interleave-1",
        kinds=_HYBRID,
        groups=_HYBRID_GROUPS,
        source=_engine(cp=2, interleave=1, group_pages={"swa": 16, "state": 1}),
        sink=_engine(group_pages={"swa": 8, "state": 1}),
    ),
    Case(
        name="hybrid-one-pool-tp2-tp1",
        kinds=(Kind(layers=(0, 2), pool="both"), Kind(layers=(1, 3), group="swa", pool="both")),
        groups=_HYBRID_GROUPS[:1],
        source=_engine(tp=2),
        sink=_engine(page_tokens=8),
    ),
    Case(
        name="draft-table-tp1-tp2",
        kinds=(Kind(), Kind(layers=(4,), group="draft")),
        groups=(KVGroup(name="draft"),),
        source=_engine(group_pages={"draft": 32}, chunks=(0.5,)),
        sink=_engine(tp=2, group_pages={"draft": 8}),
    ),
    Case(
        name="opaque-pp2-pp1",
        kinds=(Kind(components=("latent",), heads=0, head_bytes=1000, span=16, format="packed-1"),),
        source=_engine(0, pp=2, stages=(2, 2)),
        sink=_engine(0, stages=(4,)),
        requests=((77, 0), (64, 32), (1, 0), (48, 48)),
    ),
    Case(
        name="scales-tp2-tp1-page64-page16",
        kinds=_SCALES,
        source=_engine(tp=2, page_tokens=64),
        sink=_engine(page_tokens=16),
    ),
)
BY_NAME = {case.name: case for case in CASES}


def crossed() -> Iterator[Case]:
    """Combine every source of a case with every sink of a case of the same model."""
    models: dict[tuple[object, ...], list[Case]] = {}
    for case in CASES:
        models.setdefault((case.kinds, case.groups), []).append(case)
    for cases in models.values():
        for (i, one), (j, other) in product(enumerate(cases), repeat=2):
            first = one.source not in [case.source for case in cases[:i]]
            if first and other.sink not in [case.sink for case in cases[:j]]:
                name = one.name if one is other else f"{one.name}--{other.name}"
                yield msgspec.structs.replace(one, name=name, sink=other.sink, requests=((77, 32),))


FEW = (
    "tp2-tp4",
    "3-heads-tp4-tp2",
    "pp2tp2-pp2tp1",
    "cp2-cp1-zigzag",
    "mla-tp4-tp1",
    "page48-page32",
    "hybrid-tp2-tp1",
)
"""Cases for a short run over a transport with slow engines, each of a different kind."""

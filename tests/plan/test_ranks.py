"""Links between ranks against brute force: every element that each rank holds is written down, and then counted."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvroom.errors import ConfigurationError, PlanError
from kvroom.plan import Parallel, Place, RankMap, dp_rank_of, match_ranks
from sampling import amount

Element = tuple[int, int, int]  # layer, head, token
patient = settings(deadline=None, max_examples=amount(100, full=400))


def box(parallel: Parallel, place: Place, tokens: int) -> set[Element]:
    """Return every element that a rank holds of a request of `tokens` tokens, one by one from the definitions."""
    heads = parallel.kv_heads or 1
    return {
        (layer, head, token)
        for layer, head, token in product(range(sum(parallel.stages)), range(heads), range(tokens))
        if holds_layer(parallel, place.pp, layer)
        and holds_head(parallel, place.tp, head)
        and holds_token(parallel, place.cp, token)
    }


def holds_layer(parallel: Parallel, pp: int, layer: int) -> bool:
    stage_of = [stage for stage, layers in enumerate(parallel.stages) for _ in range(layers)]
    return stage_of[layer] == pp


def holds_head(parallel: Parallel, tp: int, head: int) -> bool:
    heads, ranks = parallel.kv_heads, parallel.tp
    if heads == 0:
        return True
    if heads <= ranks:
        return tp * heads // ranks == head
    dealt = [rank for rank in range(ranks) for _ in range(heads // ranks + (rank < heads % ranks))]
    return dealt[head] == tp


def holds_token(parallel: Parallel, cp: int, token: int) -> bool:
    return parallel.cp == 1 or (token // parallel.interleave) % parallel.cp == cp


def period(*sides: Parallel) -> int:
    return math.lcm(*(side.interleave * side.cp for side in sides if side.cp > 1))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Parallel, Parallel]:
    """Two engines for one model, with everything about them known."""
    layers = draw(st.integers(1, 5))
    heads = draw(st.integers(0, 6))

    def side() -> Parallel:
        borders = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=3))) if layers > 1 else []
        stages = tuple(stop - start for start, stop in zip([0, *borders], [*borders, layers], strict=True))
        return Parallel(
            tp=draw(st.integers(1, 6)),
            pp=len(stages),
            cp=draw(st.sampled_from([1, 1, 2, 3, 4])),
            dp=draw(st.integers(1, 3)),
            stages=stages,
            kv_heads=heads,
            interleave=draw(st.integers(1, 4)),
        )

    return side(), side()


def writers(links: RankMap, sink: Place) -> tuple[Place, ...]:
    return links.sources(sink)[: links.writers(sink)]


@patient
@given(pairs())
def test_the_writers_of_a_sink_hold_each_element_that_it_needs_just_once(sides: tuple[Parallel, Parallel]) -> None:
    source, sink = sides
    tokens = period(source, sink)
    assume(tokens <= 48)
    links = match_ranks(source, sink)
    held = {place: box(source, place, tokens) for place in source.places()}
    for place in sink.places():
        needed = box(sink, place, tokens)
        found = Counter(element for one in writers(links, place) for element in held[one] & needed)
        assert found == Counter(needed)
        assert all(held[one] & needed for one in writers(links, place)), "a writer with nothing to write"


@patient
@given(pairs())
def test_the_set_is_the_smallest_that_reaches_every_source_rank(sides: tuple[Parallel, Parallel]) -> None:
    """Each writer is needed (the test above): the bound is theirs plus one link for each source rank that is idle."""
    source, sink = sides
    links = match_ranks(source, sink)
    offered = [one for place in sink.places() for one in links.sources(place)]
    writing = {one for place in sink.places() for one in writers(links, place)}
    assert set(offered) == set(source.places())
    idle = source.group - len(writing)
    assert len(offered) == sum(links.writers(place) for place in sink.places()) + idle


@patient
@given(pairs())
def test_who_only_reports_holds_what_a_writer_of_the_same_sink_holds(sides: tuple[Parallel, Parallel]) -> None:
    source, sink = sides
    links = match_ranks(source, sink)
    for place in sink.places():
        sources = links.sources(place)
        assert len(set(sources)) == len(sources)
        twins = {(one.cp, source.heads(one.tp), one.pp) for one in writers(links, place)}
        for one in sources[links.writers(place) :]:
            assert (one.cp, source.heads(one.tp), one.pp) in twins
            assert links.offers(one) == 1


@patient
@given(pairs())
def test_both_sides_count_the_same_links(sides: tuple[Parallel, Parallel]) -> None:
    source, sink = sides
    links = match_ranks(source, sink)
    from_sinks = {(one, place) for place in sink.places() for one in links.sources(place)}
    from_sources = {(one, place) for one in source.places() for place in links.sinks(one)}
    assert from_sinks == from_sources
    for one in source.places():
        assert links.offers(one) == len(links.sinks(one)) >= 1


@patient
@given(pairs())
def test_replicas_and_sinks_of_one_box_share_the_work_evenly(sides: tuple[Parallel, Parallel]) -> None:
    source, sink = sides
    links = match_ranks(source, sink)
    written = Counter(one for place in sink.places() for one in writers(links, place))
    loads: dict[tuple[int, tuple[int, int], int], list[int]] = {}
    for one in source.places():
        loads.setdefault((one.cp, source.heads(one.tp), one.pp), []).append(written[one])
    for replicas in loads.values():
        assert max(replicas) - min(replicas) <= 1
    linked: dict[tuple[int, tuple[int, int], int], Counter[Place]] = {}
    for place in sink.places():
        for one in links.sources(place):
            linked.setdefault((one.cp, source.heads(one.tp), one.pp), Counter())[place] += 1
    for counts in linked.values():
        assert max(counts.values()) - min(counts.values()) <= 1


@patient
@given(pairs())
def test_equal_engines_are_linked_rank_by_rank(sides: tuple[Parallel, Parallel]) -> None:
    links = match_ranks(sides[0], sides[0])
    for place in sides[0].places():
        assert links.sources(place) == (place,)
        assert links.sinks(place) == (place,)


@patient
@given(pairs(), st.data())
def test_a_head_count_that_divides_the_stated_one_needs_no_other_links(
    sides: tuple[Parallel, Parallel], data: st.DataObject
) -> None:
    """Layers with fewer heads: the sources that hold a state's head also hold the attention's head."""
    fewer = data.draw(st.integers(1, 3))
    # Ranks and heads are powers of 2 here, because only then the same rank holds matching parts of both.
    source, sink = (
        Parallel(tp=2 ** data.draw(st.integers(0, 3)), kv_heads=8, cp=side.cp, interleave=side.interleave)
        for side in sides
    )
    links = match_ranks(source, sink)
    narrow_source, narrow_sink = (
        Parallel(tp=side.tp, kv_heads=8 >> fewer, cp=side.cp, interleave=side.interleave) for side in (source, sink)
    )
    for place in sink.places():
        lo, hi = narrow_sink.heads(place.tp)
        found = {head for one in links.sources(place) for head in range(*narrow_source.heads(one.tp))}
        assert found >= set(range(lo, hi))


def tp(size: int, kv_heads: int = 8) -> Parallel:
    return Parallel(tp=size, kv_heads=kv_heads)


def mla(size: int) -> Parallel:
    return Parallel(tp=size)


def dcp(size: int, interleave: int) -> Parallel:
    return Parallel(cp=size, interleave=interleave)


@pytest.mark.parametrize(
    ("source", "sink", "axis", "expected"),
    [
        (tp(2), tp(4), "tp", [[0], [0], [1], [1]]),
        (tp(4), tp(2), "tp", [[0, 1], [2, 3]]),
        (tp(2), tp(3, 8), "tp", [[0], [0, 1], [1]]),
        (tp(2, 3), tp(4, 3), "tp", [[0], [0], [0], [1]]),
        (tp(4, 3), tp(2, 3), "tp", [[0, 2, 1], [3]]),
        (tp(8, 2), tp(4, 2), "tp", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (tp(4, 2), tp(8, 2), "tp", [[0], [1], [0], [1], [2], [3], [2], [3]]),
        (mla(4), mla(1), "tp", [[0, 1, 2, 3]]),
        (mla(1), mla(4), "tp", [[0], [0], [0], [0]]),
        (mla(4), mla(2), "tp", [[0, 2], [1, 3]]),
        (mla(2), mla(5), "tp", [[0], [1], [0], [1], [0]]),
        (Parallel(pp=2, stages=(3, 5)), Parallel(), "pp", [[0, 1]]),
        (Parallel(), Parallel(pp=2, stages=(3, 5)), "pp", [[0], [0]]),
        (Parallel(pp=2, stages=(4, 4)), Parallel(pp=3, stages=(3, 2, 3)), "pp", [[0], [0, 1], [1]]),
        (Parallel(pp=3), Parallel(pp=3), "pp", [[0], [1], [2]]),
        (Parallel(cp=2), Parallel(), "cp", [[0, 1]]),
        (Parallel(cp=2), Parallel(cp=2), "cp", [[0, 1], [0, 1]]),
        (dcp(2, 1), Parallel(cp=2), "cp", [[0, 1], [0, 1]]),
        (dcp(2, 1), dcp(4, 1), "cp", [[0], [1], [0], [1]]),
        (dcp(4, 1), dcp(2, 1), "cp", [[0, 2], [1, 3]]),
        (dcp(2, 16), dcp(4, 16), "cp", [[0], [1], [0], [1]]),
        (dcp(2, 1), dcp(2, 16), "cp", [[0, 1], [0, 1]]),
        (dcp(2, 16), dcp(4, 8), "cp", [[0], [0], [1], [1]]),
    ],
)
def test_known_pairs(source: Parallel, sink: Parallel, axis: str, expected: list[list[int]]) -> None:
    links = match_ranks(source, sink)
    assert [[getattr(one, axis) for one in links.sources(place)] for place in sink.places()] == expected


def test_two_by_two_ranks_into_two_by_two() -> None:
    """Heads and layers together: what a sink needs is the product of both."""
    source = Parallel(tp=2, pp=2, kv_heads=4, stages=(2, 6))
    links = match_ranks(source, Parallel(tp=4, pp=2, kv_heads=4, stages=(4, 4)))
    assert [str(one) for one in links.sources(Place(0, 0, 3, 0))] == [
        "dp 0, cp 0, tp 1, pp 0",
        "dp 0, cp 0, tp 1, pp 1",
    ]
    assert [one.pp for one in links.sources(Place(0, 0, 3, 1))] == [1]
    assert [links.offers(one) for one in source.places()] == [2, 4, 2, 4]


def test_the_latent_of_context_ranks_that_also_replicate_it() -> None:
    """MLA, TP 4 with DCP 2 inside: two tensor ranks of two context ranks each, into one rank."""
    links = match_ranks(Parallel(tp=2, cp=2, interleave=1), Parallel())
    sink = Place(0, 0, 0, 0)
    assert [(one.cp, one.tp) for one in links.sources(sink)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert links.writers(sink) == 2


@pytest.mark.parametrize(("group", "dcp_size", "kv_heads"), [(8, 4, 2), (8, 2, 4), (8, 2, 2), (16, 4, 4), (8, 8, 0)])
def test_decode_context_parallelism_of_vllm_can_be_described(group: int, dcp_size: int, kv_heads: int) -> None:
    """There, neighbours of a tensor parallel group make a context group; rank r holds head r // (group // heads)."""
    described = Parallel(tp=group // dcp_size, cp=dcp_size, kv_heads=kv_heads, interleave=1)
    places = [Place(0, r % dcp_size, r // dcp_size, 0) for r in range(group)]
    assert sorted(places) == list(described.places())
    for r, place in enumerate(places):
        there = r // (group // kv_heads) if kv_heads else 0
        assert described.heads(place.tp) == (there, there + 1)


def test_places_of_another_group_are_named_on_request() -> None:
    links = match_ranks(Parallel(tp=2, dp=3, kv_heads=2), Parallel(tp=1, dp=2, kv_heads=2))
    assert links.sources(Place(1, 0, 0, 0), 2) == (Place(2, 0, 0, 0), Place(2, 0, 1, 0))
    assert links.sinks(Place(2, 0, 1, 0), 1) == (Place(1, 0, 0, 0),)
    assert list(links.source.places(2)) == [Place(2, 0, 0, 0), Place(2, 0, 1, 0)]


@pytest.mark.parametrize(
    ("source", "sink", "says"),
    [
        (tp(2, 8), tp(2, 4), "the source has 8 KV heads, the sink 4"),
        (tp(2, 8), mla(2), r"source has kv_heads=8 and the sink kv_heads=0.*of the sink with Parallel\(kv_heads=8\)"),
        (mla(1), tp(2, 4), r"source has kv_heads=0 and the sink kv_heads=4.*the source with Parallel\(kv_heads=4\)"),
        (Parallel(pp=2), Parallel(pp=3), "2 pipeline stages with unknown layers feed 3 with unknown: give stages"),
        (Parallel(pp=2, stages=(4, 4)), Parallel(pp=2), r"2 pipeline stages with \(4, 4\) layers feed 2 with unknown"),
        (Parallel(pp=2, stages=(4, 4)), Parallel(stages=(9,)), "source's stages have 8 layers, the sink's 9"),
    ],
)
def test_engines_that_cannot_run_one_model_are_refused(source: Parallel, sink: Parallel, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        match_ranks(source, sink)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tp": 0}, "tp is 0: give an int from 1 to 1024"),
        ({"dp": 1.0}, r"dp is 1\.0: give an int"),
        ({"pp": True}, "pp is True"),
        ({"kv_heads": -1}, "kv_heads is -1: give an int from 0"),
        ({"interleave": 1 << 21}, "interleave is 2097152"),
        ({"tp": 64, "pp": 32}, "cp 1 x tp 64 x pp 32 are 2048 ranks that share one request: at most 1024"),
        ({"pp": 2, "stages": (4,)}, "stages has 1 pipeline stages and pp is 2: give the layers"),
        ({"pp": 2, "stages": (4, 0)}, "stages has a stage of 0 layers: give an int from 1"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Parallel(**fields)  # type: ignore[arg-type]


def test_ranks_that_do_not_exist_are_refused_by_name() -> None:
    side = Parallel(tp=2, pp=2, kv_heads=3, stages=(1, 2))
    links = match_ranks(side, side)
    with pytest.raises(PlanError, match=r"tp rank 2 does not exist among 2 ranks: give one in \[0, 2\)"):
        links.sources(Place(0, 0, 2, 0))
    with pytest.raises(PlanError, match="pp rank -1"):
        links.sinks(Place(0, 0, 0, -1))
    with pytest.raises(PlanError, match="cp rank 1"):
        links.offers(Place(0, 1, 0, 0))
    with pytest.raises(PlanError, match="dp rank 1"):
        links.writers(Place(1, 0, 0, 0))
    with pytest.raises(PlanError, match="dp rank 5"):
        links.sources(Place(0, 0, 0, 0), 5)
    with pytest.raises(PlanError, match="dp rank 5"):
        links.sinks(Place(0, 0, 0, 0), 5)
    with pytest.raises(PlanError, match="tp rank 2"):
        side.heads(2)
    with pytest.raises(PlanError, match="pp rank 2"):
        side.layers(2)
    with pytest.raises(PlanError, match="the layers of the 2 pipeline stages are unknown: give stages"):
        Parallel(pp=2).layers(0)


def test_heads_and_layers_of_a_rank() -> None:
    side = Parallel(tp=2, pp=2, kv_heads=3, stages=(1, 2))
    assert [side.heads(rank) for rank in range(2)] == [(0, 2), (2, 3)]
    assert [side.layers(rank) for rank in range(2)] == [(0, 1), (1, 3)]
    assert [tp(4, 3).heads(rank) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (2, 3)]
    assert mla(3).heads(2) == (0, 1)


def test_room_numbers_are_followed_as_sglang_follows_them() -> None:
    assert [dp_rank_of(room, 3) for room in (0, 1, 2, 3, 2**63 - 1)] == [0, 1, 2, 0, (2**63 - 1) % 3]

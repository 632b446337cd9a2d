"""Parts, groups, states, spans, opaque bytes and dealt tokens: small cases with their blocks worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
from smallpools import rows, shard

from kvroom.errors import PlanError
from kvroom.plan import (
    KVGroup,
    KVLayout,
    Part,
    Planner,
    TokenSplit,
    array_regions,
    copies,
    extents,
    shares,
    strips,
)
from kvroom_lab import oracle


def altered(layout: KVLayout, groups: tuple[KVGroup, ...] = (), **changes: Any) -> KVLayout:
    """The same, but for each region's fields."""
    regions = tuple(msgspec.structs.replace(r, **changes) for r in layout.regions)
    return msgspec.structs.replace(layout, regions=regions, groups=groups)


SWA, WIDER = (KVGroup(name="swa", window=4),), (KVGroup(name="swa", window=8),)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            altered(shard(), span=2, token_stride=64),
            shard(),
            r"source layer 0 'k' heads \[0, 4\) has elements of 2 tokens, target layer 0 'k' .* elements of 1 tokens;",
        ),
        (
            altered(shard(), SWA, group="swa"),
            shard(),
            "source layer 0 'k' .* has page table 'swa', target layer 0 'k' .* has page table '';",
        ),
        (
            altered(shard(), format="a"),
            altered(shard(heads=(2, 6)), format="b"),
            r"heads \[0, 4\) has format 'a', target .* heads \[2, 6\) has format 'b'; start both sides with the same",
        ),
        (
            altered(shard(), format="a"),
            altered(shard(heads=(2, 6)), format="a"),
            r"source .* heads \[0, 4\) and target .* heads \[2, 6\) have the opaque format 'a', which cannot be cut",
        ),
        (
            altered(shard(), SWA, group="swa"),
            altered(shard(), WIDER, group="swa"),
            r"source group 'swa' has a window of 4 tokens, target group 'swa' has 8 \(0: no window\); start both",
        ),
    ],
)
def test_what_means_different_things_is_refused_by_name(source: KVLayout, target: KVLayout, message: str) -> None:
    for call in (Planner, strips, lambda s, t: shares([s], t)):
        with pytest.raises(PlanError, match=message):
            call(source, target)


def test_opaque_regions_that_share_no_head_are_no_fault() -> None:
    source = KVLayout(
        (*shard(components=["x", "v"]).regions, *altered(shard(base=10**5), format="a").regions[::2]), "int8"
    )
    target = KVLayout(
        (*shard(components=["x", "v"]).regions, *altered(shard(base=10**5, heads=(4, 8)), format="a").regions[::2]),
        "int8",
    )
    assert copies(source, target, [1], [2], 0, 4).nbytes == 2 * 2 * 4 * 4 * 8


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [Part(0, 5, 0, 4)],
            r"Part\(first=0, last=5, lo=0, hi=4\) names no heads of the target's 4 regions; give half-open ranges",
        ),
        ([Part(2, 2, 0, 4)], r"Part\(first=2, last=2, lo=0, hi=4\) names no heads"),
        ([Part(-1, 2, 0, 4)], r"Part\(first=-1, last=2, lo=0, hi=4\) names no heads"),
        ([Part(0, 1, 2, 2)], r"Part\(first=0, last=1, lo=2, hi=2\) names no heads"),
        (
            [Part(0, 4, 0, 5)],
            r"heads \[0, 5\) of target layer 0 'k' .* source and target share only \[\[0, 4\]\] of them",
        ),
        (
            [Part(1, 2, 4, 5)],
            r"heads \[4, 5\) of target layer 0 'v' heads \[0, 6\) are to be written, but .* share only",
        ),
        ([Part(0, 2, 0, 2), Part(1, 3, 1, 3)], r"head 1 of target layer 0 'v' heads \[0, 6\) is named by two parts"),
        ([Part(0, 4, 0, 4)] * 7, "7 parts name more than the target's heads; name each head once"),
    ],
)
def test_parts_that_are_not_there_or_meet_are_refused(parts: list[Part], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Planner(shard(), shard(heads=(0, 6)), parts)


def test_a_part_of_an_opaque_region_is_refused() -> None:
    opaque = altered(shard(), format="a")
    assert rows(Planner(opaque, opaque, [Part(1, 2, 0, 4)]).copies([0], [0], 0, 4)) == [(512, 512, 128)]
    with pytest.raises(PlanError, match=r"heads \[0, 2\) of target .* whose opaque format 'a' cannot be cut; name all"):
        Planner(opaque, opaque, [Part(0, 4, 0, 2)])


def test_parts_choose_what_is_copied_in_any_order() -> None:
    planner = Planner(shard(), shard(base=10**4), [Part(1, 3, 2, 3), Part(1, 2, 0, 1)])
    region, page = 4 * 4 * 32, 4 * 32
    heads = [(1, 0), (1, 2), (2, 2)]
    at = sorted(number * region + page + token * 32 + 8 * head for number, head in heads for token in range(4))
    assert rows(planner.copies([1], [1], 0, 4)) == [(src, 10**4 + src, 8) for src in at]
    assert oracle.as_ranges(planner.extents([1], 0, 4)) == [(10**4 + src, 8) for src in at]


def test_no_parts_move_nothing_whatever_the_layouts_share() -> None:
    for source in (shard(), shard(layers=[7])):
        planner = Planner(source, shard(), ())
        assert rows(planner.copies([1, 2], [9], 0, 4)) == []
        assert oracle.as_ranges(planner.extents([1], 0, 4)) == []
        assert strips(source, shard(), ()) == ((), ())


def hybrid(slots: int = 3, base: int = 0) -> KVLayout:
    """K and V of layer 0, and a state of two heads of 8 bytes for each request in layer 1."""
    states = array_regions(
        base + 10**5, (slots, 2, 8), (16, 8, 1), "PHD", itemsize=1, layers=[1], components=["ssm"], group="state"
    )
    return KVLayout((*shard(layers=[0], base=base).regions, *states), "int8", groups=(KVGroup(name="state", window=1),))


def test_a_state_is_a_group_whose_page_is_the_request_and_moves_once() -> None:
    source, target = hybrid(3), hybrid(5, base=10**6)
    planner = Planner(source, target)
    start = target.window_start("state", 37)
    assert start == source.window_start("state", 37) == 36
    assert rows(planner.copies([2], [4], start, 37, group="state")) == [(10**5 + 32, 10**6 + 10**5 + 64, 16)]
    assert oracle.as_ranges(planner.extents([4], start, 37, group="state")) == [(10**6 + 10**5 + 64, 16)]
    assert planner.copies([0], [0], 0, 4).nbytes == 2 * 4 * 32
    with pytest.raises(PlanError, match=r"target page 5 is not in the target's pool of pages \[0, 5\)"):
        planner.copies([2], [5], start, 37, group="state")
    with pytest.raises(PlanError, match=r"2 source pages given, but tokens \[36, 37\) take 1 pages of 1 tokens"):
        planner.copies([1, 2], [4], start, 37, group="state")


def test_a_group_that_is_not_shared_gives_no_blocks_and_a_group_of_nobody_is_refused() -> None:
    planner = Planner(hybrid(), shard(layers=[0]))
    assert rows(planner.copies([2], [], 36, 37, group="state")) == []
    assert oracle.as_ranges(planner.extents([2], 36, 37, group="state")) == []
    for call in (lambda: planner.copies([2], [2], 0, 1, group="swa"), lambda: planner.extents([2], 0, 1, group="swa")):
        with pytest.raises(PlanError, match=r"no group 'swa' in either layout; they have \['', 'state'\], give one"):
            call()


def test_a_layer_of_a_draft_model_is_one_more_layer() -> None:
    """With a number of its own, heads of its own and a component of any name."""
    draft = array_regions(10**5, (4, 4, 1, 8), (32, 8, 8, 1), "PTHD", itemsize=1, layers=[1000], components=["draft k"])
    both = KVLayout((*shard().regions, *draft), "int8")
    assert copies(both, both, [1], [2], 0, 4).nbytes == 2 * 2 * 4 * 32 + 4 * 8
    assert copies(both, shard(), [1], [2], 0, 4).nbytes == 2 * 2 * 4 * 32


def scaled(base: int = 0) -> KVLayout:
    """A latent of 8 bytes a token in pages of 8 tokens, and a scale of 2 bytes for each 4 tokens."""
    latent = array_regions(base, (4, 8, 8), (64, 8, 1), "PTD", itemsize=1, components=["latent"])
    scale = array_regions(base + 256, (4, 2, 2), (4, 2, 1), "PTD", itemsize=1, components=["scale"], span=4)
    return KVLayout((*latent, *scale), "int8")


def test_an_element_that_covers_several_tokens_moves_whole() -> None:
    planner = Planner(scaled(), scaled(base=1000))
    assert rows(planner.copies([1], [2], 0, 1)) == [(64, 1128, 8), (260, 1264, 2)]
    assert rows(planner.copies([1], [2], 4, 7)) == [(64 + 32, 1128 + 32, 24), (262, 1266, 2)]
    assert rows(planner.copies([1], [2], 0, 5)) == [(64, 1128, 40), (260, 1264, 4)]
    assert rows(planner.copies([], [], 6, 6)) == []
    assert rows(planner.copies([1], [2], 6, 6, source_start=0, target_start=0)) == []


def test_a_window_that_begins_inside_an_element_is_refused() -> None:
    planner = Planner(scaled(), scaled(base=1000))
    wrong = r"tokens \[6, 8\) begin inside an element that covers several tokens; begin at a multiple of 4"
    with pytest.raises(PlanError, match=wrong):
        planner.copies([1], [2], 6, 8)
    with pytest.raises(PlanError, match=wrong):
        planner.extents([2], 6, 8)
    only_latent = Planner(scaled(), KVLayout(scaled(base=1000).regions[:1], "int8"))
    assert rows(only_latent.copies([1], [2], 6, 8)) == [(64 + 48, 1128 + 48, 16)]


def test_dealt_tokens_are_packed_on_their_ranks() -> None:
    """Two ranks deal out two tokens at a time; pages of 4, one element of 8 bytes a token."""
    regions = array_regions(0, (4, 4, 8), (32, 8, 1), "PTD", itemsize=1, components=["latent"])
    even, odd = (KVLayout(regions, "int8", split=TokenSplit(rank=rank, size=2, interleave=2)) for rank in range(2))
    whole = KVLayout(regions, "int8")
    assert (even.window_pages(0, 9), odd.window_pages(0, 9), whole.window_pages(0, 9)) == (2, 1, 3)
    # Tokens 0 1 4 5 | 8 lie in pages 3 and 1 of the even rank, 2 3 6 7 in page 2 of the odd one.
    assert rows(copies(even, whole, [3, 1], [0, 1, 2], 0, 9)) == [(96, 0, 16), (112, 32, 16), (32, 64, 8)]
    assert rows(copies(odd, whole, [2], [0, 1, 2], 0, 9)) == [(64, 16, 16), (80, 48, 16)]
    assert rows(copies(whole, odd, [0, 1, 2], [2], 0, 9)) == [(16, 64, 16), (48, 80, 16)]
    assert rows(copies(even, even, [3, 1], [1, 2], 0, 9)) == [(96, 32, 32), (32, 64, 8)]
    assert rows(copies(even, odd, [3, 1], [2], 0, 9)) == []
    assert oracle.as_ranges(extents(odd, [2], 0, 9)) == [(64, 32)]
    assert oracle.as_ranges(Planner(even, whole).extents([0, 1, 2], 0, 9)) == [(0, 16), (32, 16), (64, 8)]
    with pytest.raises(
        PlanError, match=r"3 source pages given, but tokens \[0, 9\) \(only those of rank 0 of 2, interl"
    ):
        copies(even, whole, [1, 2, 3], [0, 1, 2], 0, 9)


def test_a_single_page_is_planned_without_looking_at_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small room pays for every array: no group and any group take the short way; only dealt tokens do not."""
    pairs = [(Planner(shard(), shard()), ""), (Planner(hybrid(), hybrid()), ""), (Planner(hybrid(), hybrid()), "state")]
    monkeypatch.delattr(sys.modules["kvroom.plan.planner"], "SidePages")
    for planner, group in pairs:
        first = rows(planner.copies([1], [2], 3, 4, group=group))
        assert len(first) > 0
        assert rows(planner.copies([1], [2], 3, 4, group=group)) == first
        assert len(planner.extents([2], 3, 4, group=group).length) > 0
    with pytest.raises(NameError, match="SidePages"):
        pairs[0][0].copies([1, 2], [2, 3], 0, 8)

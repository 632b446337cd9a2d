"""The assignment of writers: the first of several holders writes, and heads without a holder are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from smallpools import shard

from kvroom.errors import PlanError
from kvroom.plan import KVGroup, KVLayout, Part, Planner, TokenSplit, copies, shares


def dealt(rank: int, size: int = 2, interleave: int = 4, **changes: Any) -> KVLayout:
    """A pool that holds only the tokens of one rank of several."""
    return shard(split=TokenSplit(rank=rank, size=size, interleave=interleave), **changes)


OUTER = tuple(Part(i, i + 1, lo, lo + 1) for i in range(4) for lo in (0, 3))  # the first and the last head
HALVES = [shard(heads=(2, 4)), shard(heads=(0, 2))]


@pytest.mark.parametrize(
    ("sources", "target", "wanted"),
    [
        ([shard()], shard(), (None,)),
        (HALVES, shard(), (None, None)),
        ([shard(layers=[1]), shard(layers=[0])], shard(), (None, None)),
        ([shard(), shard()], shard(), (None, ())),  # replicas, a latent cache on every rank
        ([shard(heads=(4, 6)), shard()], shard(), ((), None)),  # shares nothing
        ([shard(layers=[0]), shard()], shard(), (None, (Part(2, 4, 0, 4),))),
        ([shard(heads=(1, 3)), shard()], shard(), (None, OUTER)),
        ([shard(heads=(0, 3)), shard(heads=(2, 6))], shard(), (None, (Part(0, 4, 3, 4),))),
        (
            [shard(layers=[1, 2], heads=(0, 6)), shard(layers=[0], heads=(3, 8)), shard(layers=[0], heads=(0, 3))],
            shard(),
            (None, None, None),
        ),
        ([dealt(0), dealt(1)], shard(), (None, None)),
        ([dealt(1), dealt(0), dealt(1)], shard(), (None, None, ())),
        ([dealt(0), shard(), dealt(1)], shard(), (None, (), None)),  # the first family that is complete
        ([dealt(0), shard()], shard(), ((), None)),
        ([dealt(0, interleave=0), dealt(1, interleave=0)], shard(), (None, None)),
        ([dealt(0), dealt(1)], dealt(1), ((), None)),  # the target needs no token of the other source
        ([dealt(1)], dealt(1), (None,)),
        ([dealt(0, 3), dealt(2, 3), dealt(1, 3)], dealt(0, 6), (None, (), ())),
        ([dealt(0, 4), dealt(2, 4)], dealt(0), (None, None)),
    ],
)  # fmt: skip
def test_each_head_is_written_by_the_first_that_holds_it(
    sources: list[KVLayout], target: KVLayout, wanted: tuple[tuple[Part, ...] | None, ...]
) -> None:
    assert shares(sources, target) == wanted


@pytest.mark.parametrize(
    ("sources", "target", "message"),
    [
        (
            [],
            shard(),
            r"target layer 0 'k' heads \[0, 4\): none of the 0 sources holds head 0; add the source rank that",
        ),
        ([shard(layers=[0])], shard(), r"target layer 1 'k' heads \[0, 4\): none of the 1 sources holds head 0;"),
        ([shard(heads=(0, 3))], shard(), "target layer 0 'k' .*: none of the 1 sources holds head 3"),
        ([shard(heads=(0, 1)), shard(heads=(2, 4))], shard(), "none of the 2 sources holds head 1"),
        ([shard(components=["k", "x"])], shard(), "target layer 0 'v' .*: none of the 1 sources holds head 0"),
        ([shard(), shard(D=16)], shard(), "has 16 bytes a head"),
        ([dealt(0)], shard(), "holds head 0 for the tokens of rank 1 of 2, interleave 4; add the source rank"),
        ([dealt(1)], dealt(0), "holds head 0 for the tokens of rank 0 of 2, interleave 4"),
        ([dealt(0), dealt(1, heads=(0, 2))], shard(), "holds head 2 for the tokens of rank 1 of 2, interleave 4"),
        ([dealt(0), dealt(1, interleave=8)], shard(), "holds head 0 for the tokens of rank 1 of 2, interleave 4"),
        ([dealt(0, 2, 0)], shard(), "holds head 0 for the tokens of rank 1 of 2, interleave 0"),
    ],
)
def test_what_nobody_holds_is_refused(sources: list[KVLayout], target: KVLayout, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shares(sources, target)


def with_window(layout: KVLayout, window: int) -> KVLayout:
    """The same, its layer 1 in a group that keeps the last tokens."""
    regions = tuple(msgspec.structs.replace(r, group="swa") if r.layer == 1 else r for r in layout.regions)
    return msgspec.structs.replace(layout, regions=regions, groups=(KVGroup(name="swa", window=window),))


def test_what_has_a_window_is_whole_on_ranks_that_split_tokens() -> None:
    sources = [with_window(dealt(rank), 4) for rank in (1, 0)]
    assert shares(sources, with_window(shard(), 4)) == (None, (Part(0, 2, 0, 4),))
    assert shares(sources, with_window(dealt(0), 4)) == ((Part(2, 4, 0, 4),), (Part(0, 2, 0, 4),))


def test_of_ranks_that_scatter_the_tokens_any_may_send_a_window() -> None:
    """The engine names the rank that sends the window, as it names the tokens of each send."""
    sources = [with_window(dealt(rank, interleave=0), 4) for rank in (1, 0)]
    assert shares(sources, with_window(shard(), 4)) == (None, None)


def test_a_group_without_a_window_is_split_like_the_main_group() -> None:
    sources = [with_window(dealt(rank), 0) for rank in (1, 0)]
    assert shares(sources, with_window(shard(), 0)) == (None, None)
    assert shares(sources, with_window(dealt(0), 0)) == ((), None)


def test_shares_together_move_everything_once() -> None:
    target, sources = shard(base=10**6), [shard(heads=(0, 3)), shard(heads=(2, 6)), shard()]
    moved = [
        Planner(source, target, parts).copies([1], [2], 0, 4).nbytes
        for source, parts in zip(sources, shares(sources, target), strict=True)
    ]
    assert moved == [3 * 4 * 4 * 8, 1 * 4 * 4 * 8, 0]
    assert sum(moved) == target.window_nbytes(0, 4) == copies(sources[2], target, [1], [2], 0, 4).nbytes


def test_an_opaque_region_is_written_whole() -> None:
    regions = tuple(msgspec.structs.replace(r, format="packed") for r in shard().regions)
    opaque = msgspec.structs.replace(shard(), regions=regions)
    assert shares([opaque, opaque], opaque) == (None, ())
    halves = tuple(msgspec.structs.replace(r, heads=2, head_range=(0, 2)) for r in regions)
    with pytest.raises(
        PlanError, match="the opaque format 'packed', which cannot be cut; give both sides the same heads"
    ):
        shares([opaque], msgspec.structs.replace(shard(), regions=halves))

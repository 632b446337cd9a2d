"""Every pair of engines in one process: the plans of all its ranks write each element exactly once, and correctly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvroom.plan import Blocks, Planner
from kvroom_lab.ranks.cases import BY_NAME, CASES, Case, crossed
from kvroom_lab.ranks.direct import run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plans_of_a_case(case: Case) -> None:
    assert run(case) == []


def test_the_plans_of_every_source_with_every_sink() -> None:
    every = list(crossed())
    assert len(every) >= 200
    assert {case.name: wrong for case in every if (wrong := run(case))} == {}


def shorter(blocks: Blocks) -> Blocks:
    blocks.length[0] -= 1
    return blocks


def further(blocks: Blocks) -> Blocks:
    return blocks._replace(dst=blocks.dst + blocks.dst.dtype.type(8))


def swapped(blocks: Blocks) -> Blocks:
    blocks.src[[0, 1]] = blocks.src[[1, 0]]
    return blocks


@pytest.mark.parametrize("bend", [shorter, further, swapped])
def test_a_wrong_block_is_found(bend: Callable[[Blocks], Blocks], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Planner.copies
    monkeypatch.setattr(Planner, "copies", lambda *args, **kwargs: bend(right(*args, **kwargs)))
    assert run(BY_NAME["tp2-tp4"])

"""Every state that small worlds can reach keeps the laws, and every planted bug is found with its shortest trace.

A quick run draws some of the worlds, one of those with the most states among them, and some of the bugs.
`python -m kvroom_lab.explore --all` visits larger ones.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutants import PLANTED, CountsADoneTwice, Planted

from kvroom_lab.explore import LARGER, SCOPES, Deaths, Found, LawBroken, Machines, Scope, explore
from kvroom_lab.explore.__main__ import main

# The number of states to visit, less a tenth: a world that shrinks unnoticed would prove less.
AT_LEAST = {
    "two chunks": 6_000,
    "a link is lost": 6_300,
    "a link is lost, the sink writes": 4_100,
    "a process dies": 10_500,
    "a process dies, the sink writes": 5_700,
    "checksums": 5_000,
    "used twice": 10_000,
    "used twice, links come late": 12_000,
    "two decode workers": 11_500,
    "two ranks": 35_000,
    "two ranks, the sink writes": 13_500,
    "two ranks, checksums": 6_300,
    "two ranks, a process dies": 80_000,
    "slow offers": 9_400,
    "slow offers, a source opens twice": 16_800,
    "slow offers, a sink opens twice": 24_800,
    "two requests": 2_200,
    "two decode ranks": 21_500,
    "two decode ranks, checksums": 10_200,
    "a death, a witness": 1_280,
    "a death, a witness elsewhere": 560,
    "a death, a newcomer": 500,
    "a death, an operator": 640,
    "a death, an operator and a newcomer": 300,
    "a death, seen here": 345,
}
LARGE = [name for name in SCOPES if AT_LEAST[name] > 15_000]


@pytest.mark.sampled(kinds=lambda case: [type(SCOPES[case["name"]])], least=9)
@pytest.mark.parametrize("name", [name for name in SCOPES if name not in LARGE])
def test_the_laws_hold_in_every_state(name: str) -> None:
    keep_the_laws(name)


@pytest.mark.sampled
@pytest.mark.parametrize("name", LARGE)
def test_the_laws_hold_in_every_state_of_a_large_world(name: str) -> None:
    keep_the_laws(name)


def keep_the_laws(name: str) -> None:
    explored = explore(SCOPES[name])
    print(f"{name}: {explored.states} states, {explored.steps} steps, {explored.cpu_s:.1f} s")
    assert explored.states >= AT_LEAST[name]


@pytest.mark.sampled(least=20)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.bug.__name__)
def test_a_planted_bug_is_found(planted: Planted) -> None:
    """The search is breadth first: the trace has exactly `steps` actions, and no shorter one breaks a law."""
    with pytest.raises(Found) as found:
        explore(planted.scope, planted.machines)
    print(planted.bug.__doc__, found.value, sep="\n")
    assert re.match(rf"{planted.law}: ", found.value.law)
    assert len(found.value.trace) == planted.steps


@pytest.mark.sampled(least=4)
@pytest.mark.parametrize("scope", sorted({planted.scope for planted in PLANTED} - set(SCOPES.values()), key=repr))
def test_the_scopes_of_the_planted_bugs_are_clean_without_them(scope: Scope | Deaths) -> None:
    assert explore(scope).states > 100


def test_every_planted_bug_is_described_and_planted_once() -> None:
    bugs = [planted.bug for planted in PLANTED]
    assert len(bugs) == len(set(bugs)) >= 35
    assert all(bug.__doc__ for bug in bugs)


def test_exploring_twice_visits_the_same() -> None:
    scope = SCOPES["checksums"]
    assert explore(scope)[:3] == explore(scope)[:3]


def test_a_scope_that_is_too_large_says_so() -> None:
    with pytest.raises(LawBroken, match="over 100 states: narrow the scope"):
        explore(Scope(), limit=100)


def test_a_rank_that_reports_twice_is_kept_out_by_the_table_too() -> None:
    """`CountsADoneTwice` is planted together with a table that takes a repeated message, because the table hides it."""
    scope = next(planted.scope for planted in PLANTED if planted.bug is CountsADoneTwice)
    assert explore(scope, Machines(sink=CountsADoneTwice)).states > 1_000


def test_the_command_prints_one_line_for_each_scope(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scope", "checksums"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["scope", "states"]
    assert re.match(r"checksums +\d+ +\d+ +\d+ +[\d.]+$", line)


def test_larger_scopes_have_names_of_their_own() -> None:
    assert not SCOPES.keys() & LARGER.keys()


def test_the_architecture_page_has_the_number_of_planted_bugs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text()
    assert f"{len(PLANTED)} in the state machines, the table and the fences" in " ".join(page.split())

"""Sampling: each value of what a test names occurs, the seed decides the rest, and `--full` leaves nothing out."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from sampling import covering

CASES = list(product("abcd", range(3)))
TESTS = """
import pytest

@pytest.fixture(params=[0, 1, 2])
def number(request):
    return request.param

@pytest.mark.sampled("letter", "number")
@pytest.mark.parametrize("letter", list("abcd"))
def test_sampled(letter, number):
    pass

@pytest.mark.sampled(together="number")
@pytest.mark.parametrize("letter", list("ab"))
def test_first(letter, number):
    pass

@pytest.mark.sampled(together="number")
def test_second(number):
    pass

def test_another():
    pass
"""
PROPERTY = """
from hypothesis import given, strategies

seen = []

@given(strategies.integers())
def test_drawn(number):
    seen.append(number)

def test_print():
    print("numbers:", seen)
"""


@pytest.mark.parametrize("least", [1, 4, 7, 12, 20])
@pytest.mark.parametrize("seed", range(20))
def test_each_value_occurs(seed: int, least: int) -> None:
    drawn = covering(random.Random(seed), CASES, CASES, least)
    assert drawn == sorted(set(drawn))
    assert {letter for letter, _ in drawn} == set("abcd")
    assert {number for _, number in drawn} == {0, 1, 2}
    assert min(least, 12) <= len(drawn) <= max(least, 6)


@pytest.mark.parametrize("least", [0, 1, 3])
def test_a_test_that_names_no_argument_gets_as_many_cases_as_it_asks_for(least: int) -> None:
    assert len(covering(random.Random(1), CASES, [()] * len(CASES), least)) == least


def test_different_seeds_draw_different_cases() -> None:
    assert len({tuple(covering(random.Random(seed), CASES, CASES)) for seed in range(20)}) > 10


def collected(folder: Path, *options: str) -> tuple[list[str], str]:
    """The tests that a run of pytest with these options would make, and all that it said."""
    (folder / "test_them.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "sampling", "--collect-only", "-q", "--verbose", *options]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"<Function (\S+)>", done.stdout), done.stdout


def test_the_printed_seed_draws_the_same_cases_again(tmp_path: Path) -> None:
    first, said = collected(tmp_path)
    (seed,) = re.findall(r"--sample-seed (\d+)", said)
    again, _ = collected(tmp_path, "--sample-seed", seed)
    assert again == first
    assert "test_another" in first
    names = [name.partition("[")[2] for name in first if name.startswith("test_sampled[")]
    assert set().union(*(re.findall(r"[a-d0-9]", name) for name in names)) == {*"abcd", *"012"}
    assert 4 <= len(names) <= 6


def test_tests_that_share_a_fixture_get_the_same_value_of_it(tmp_path: Path) -> None:
    drawn, _ = collected(tmp_path)
    (number,) = [name.removeprefix("test_second") for name in drawn if name.startswith("test_second")]
    firsts = [name for name in drawn if name.startswith("test_first")]
    assert sorted(firsts) == [f"test_first[{number[1]}-{letter}]" for letter in "ab"]


def test_full_runs_and_named_tests_leave_nothing_out(tmp_path: Path) -> None:
    assert len(collected(tmp_path, "--full")[0]) == 12 + 6 + 3 + 1
    assert len(collected(tmp_path, "test_them.py::test_sampled")[0]) == 12


def test_property_tests_draw_from_the_seed_also_in_ci(tmp_path: Path) -> None:
    drawn = [numbers_of(tmp_path / name, "--sample-seed", seed) for name, seed in [("a", "5"), ("b", "5"), ("c", "6")]]
    assert drawn[0] == drawn[1] != drawn[2]


def numbers_of(folder: Path, *options: str) -> str:
    """The numbers that a property test was given; each folder has a database of examples of its own."""
    folder.mkdir()
    (folder / "test_them.py").write_text(PROPERTY)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-s", "-q", *options]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "CI": "true"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.partition("numbers: ")[2].partition("\n")[0]

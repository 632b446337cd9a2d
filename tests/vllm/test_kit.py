"""The kit itself: what it would take for a right answer, and which prompts it asks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import prompts
import pytest
from fleet import Process
from reference import Expected

EXPECTED = Expected([5, 6, 7], [[5], [6, 9], [7]])


@pytest.mark.parametrize(
    ("tokens", "agreed"),
    [
        pytest.param([5, 6, 7], 3, id="equal"),
        pytest.param([5, 9, 1], 1, id="parts at a near tie"),
        pytest.param([5, 7, 7], -1, id="wrong at a near tie"),
        pytest.param([6, 6, 7], -1, id="wrong where one token is best"),
        pytest.param([5, 6, 8], -1, id="wrong at the end"),
    ],
)
def test_an_answer_may_part_at_a_near_tie_only(tokens: list[int], agreed: int) -> None:
    assert EXPECTED.agreed(tokens) == agreed


def test_an_answer_of_another_length_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        EXPECTED.agreed([5, 6])


def test_prompts_are_what_they_are_said_to_be(model: Path) -> None:
    short, long = prompts.short(model), prompts.long(model)
    assert (len(short), len(long)) == (10, 10)
    assert all(10 < len(prompt) < 100 for prompt in short)
    assert all(1300 < len(prompt) < 1700 for prompt in long)
    assert len({prompt[:128] for prompt in [*short, *long]}) == 20, "two prompts have their first block in common"
    assert prompts.long(model) == long


@pytest.mark.parametrize("how", ["kill", "end"])
def test_a_process_ends_with_all_that_it_started(tmp_path: Path, how: str) -> None:
    child = "import time; time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('up'); {child}"
    process = Process("parent", [sys.executable, "-c", parent], tmp_path / "log", deadline_s=60)
    end = time.monotonic() + 30
    while "up" not in process.said():
        assert time.monotonic() < end, process.said()
    family = process.family()
    assert len(family) == 3  # the bound on its time, itself, its child
    getattr(process, how)()
    assert not [one for one in family if one.is_running() and one.status() != "zombie"]

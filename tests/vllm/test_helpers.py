"""Tests of the test helpers: the prompts, and the end of processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import prompts
import pytest
from fleet import Process


def test_prompts_are_as_described(model: Path) -> None:
    short, long = prompts.short(model), prompts.long(model)
    assert (len(short), len(long)) == (10, 10)
    assert all(10 < len(prompt) < 100 for prompt in short)
    assert all(700 < len(prompt) < 900 for prompt in long)
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

"""Sharing a machine: a file's tests run on one worker, and the groups that come first exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sharing import LONGEST_FIRST, TOGETHER
from test_lint import COMMANDS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("group", LONGEST_FIRST)
def test_what_comes_first_exists(group: str) -> None:
    assert group in (*TOGETHER.values(), *COMMANDS) or (TESTS / group).is_file()


@pytest.mark.parametrize("folder", TOGETHER)
def test_what_stays_together_exists(folder: str) -> None:
    assert (TESTS / folder).is_dir()


def test_a_file_runs_on_one_worker() -> None:
    """With the versions of pytest and pytest-xdist that are installed: not all of them go together."""
    files = ["wire/test_address.py", "wire/test_frames.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup", "-v"]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in files)],
        cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"^\[(gw\d)\].* PASSED .*@(\S+)\s*$", done.stdout, re.MULTILINE))
    assert sorted(group for _, group in ran) == files

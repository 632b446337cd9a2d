"""The source passes ruff, mypy, the import contracts and the rules about words, as in `make lint`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ["ruff check", "ruff format --check", "mypy", "lint-imports", "python scripts/check_wording.py"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", [pytest.param(one, marks=pytest.mark.xdist_group(one)) for one in COMMANDS])
def test_it_has_nothing_to_say(command: str) -> None:
    name, *arguments = command.split()
    tool = Path(sys.executable).parent / name
    done = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_the_same() -> None:
    rules = (ROOT / "Makefile").read_text()
    recipe = rules.partition("\nlint: ")[2].partition("\n\n")[0].splitlines()[1:]
    assert recipe == [f"\t$(BIN)/{command}" for command in COMMANDS]

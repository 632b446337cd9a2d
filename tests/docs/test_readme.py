"""The README as a new user types it: its lines, in bash on a terminal, with nothing in the environment.

The clone is a copy of the files of this checkout. Its `.venv` is the environment of this test, which `make test` has
made in the same way: making it once more would take minutes and show nothing new. Home, cache and variables are empty.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from .pages import ROOT, blocks

PROMPT = "ready$ "
LONG_AGO_S = 1e9
WITHIN_S = 240
QUICK_START = re.compile(r"^## Quick start\n(.*?)^## ", re.MULTILINE | re.DOTALL)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()=>][B0]?")


def typed() -> list[list[str]]:
    """Return the lines of each block of the quick start in bash; an indented line continues the one before."""
    found = QUICK_START.search((ROOT / "README.md").read_text())
    assert found is not None
    texts = [block.text for block in blocks(found[1]) if block.language == "bash"]
    return [re.split(r"\n(?! )", text.rstrip("\n")) for text in texts]


class Terminal:
    """A terminal in which a person types."""

    def __init__(self, directory: Path, home: Path) -> None:
        environ = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "xterm", "LANG": "C.UTF-8"}
        self._bash = pexpect.spawn(
            "bash", ["--norc", "--noprofile"],
            cwd=str(directory), env=environ, encoding="utf-8", dimensions=(50, 200), timeout=WITHIN_S,
        )  # fmt: skip
        setting = f"bind 'set enable-bracketed-paste off'; VIRTUAL_ENV_DISABLE_PROMPT=1; PS1='{PROMPT}'"
        self._bash.sendline(setting)
        self._bash.expect(rf"[\r\n](\x1b\[\?2004h)?{re.escape(PROMPT)}", timeout=10)

    def type(self, line: str) -> None:
        """Type a line and do not wait."""
        self._bash.sendline(line)

    def until(self, pattern: str) -> str:
        """Wait until the screen shows the pattern. Return all that it showed before and with it."""
        self._bash.expect(pattern)
        return CONTROL.sub("", f"{self._bash.before}{self._bash.after}")

    def run(self, line: str) -> str:
        """Type a line, wait for its end, and return what it showed. Its status has to be 0."""
        self.type(f"{line}; echo status=$?")
        shown = self.until(r"status=\d+\s")
        assert shown.rstrip().endswith("status=0"), shown
        return shown

    def interrupt(self) -> str:
        """Press Ctrl-C and return what the screen shows until the prompt."""
        self._bash.sendintr()
        return self.until(re.escape(PROMPT))

    def end(self) -> None:
        """Close the terminal, which ends what runs in it."""
        self._bash.close(force=True)


@contextmanager
def terminal(directory: Path, home: Path) -> Iterator[Terminal]:
    """A terminal that is closed when the block ends."""
    opened = Terminal(directory, home)
    try:
        yield opened
    finally:
        opened.end()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files of this checkout, older than the environment, so that make finds it complete."""
    target = tmp_path_factory.mktemp("home") / "kvroom"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
            os.utime(target / name, (LONG_AGO_S, LONG_AGO_S))
    (target / ".venv").symlink_to(sys.prefix)
    return target


@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_quick_start_as_it_stands(clone: Path) -> None:
    home = clone.parent
    demo, up, ask, install, wheel = typed()
    with terminal(clone, home) as first, terminal(clone, home) as second, terminal(clone, home) as third:
        for line in demo:
            shown = first.run(line)
        assert "every token equal, nothing left open" in shown

        for line in up[:-1]:
            first.run(line)
        first.type(up[-1])
        started = first.until("Ctrl-C ends all processes")
        for name in ("prefill-0", "decode-0", "router"):
            assert re.search(rf"^{name} .*http://127\.0\.0\.1:\d+ .*{name}\.log\s*$", started, re.MULTILINE), started
        (suggested,) = re.findall(r"^try: (curl .*?)\r?$", started, re.MULTILINE)

        for line in ask[:-1]:
            shown = second.run(line)
        assert "Paris" in shown
        second.type(ask[-1])
        second.until(r"counts of the last \d")
        third.run(suggested)
        watched = second.until(r"the last rooms that ended.*?\n.*?(prefill|decode) .*?handed over")
        assert "handed over" in watched
        assert "Traceback" not in second.interrupt()
        ended = first.interrupt()
        assert "all processes have ended" in ended
        assert "Traceback" not in ended

        for line in install:
            shown = third.run(line)
        assert "auto" in shown
        for line in wheel:
            third.run(line)
        assert third.run("~/kvroom-env/bin/kvroom --version").count("kvroom 0.") == 1

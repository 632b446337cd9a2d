"""Counts, files, targets and command lines that the pages name are those of the code."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kvroom.cli.parser import parse
from kvroom.conformance.suite import CHECKS
from kvroom.core.settings import Limits
from kvroom.runtime.link import LinkLimits
from kvroom.runtime.resolver import MAX_SOURCES
from kvroom.wire.handshake import VERSIONS
from kvroom_lab.soak.command import _parser as soak_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
FOLDERS = ("src/kvroom", "lab/kvroom_lab", "tests", "scripts", "bench", "examples", "docs")
PLACEHOLDER = re.compile(r"(?<![\w-])(?:URL|MODEL|HOST|A|B|N|\.\.\.)(?![\w-])")


def page(name: str) -> str:
    """Return the text of a page, each paragraph on one line."""
    return re.sub(r"(?<!\n)\n(?!\n)\s*", " ", (ROOT / name).read_text())


def beside(folder: str, module: str) -> ModuleType:
    """Import a helper module of the tests from its folder."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(ROOT / folder))


def test_counts_are_those_of_the_code() -> None:
    assert f"A conformance suite of {len(CHECKS)} checks" in page("README.md")
    assert f"protocol version {VERSIONS[1]}." in page("CHANGELOG.md")
    assert f"a room links with {MAX_SOURCES} of them at most" in page("CHANGELOG.md")
    assert f"{len(beside('tests/core', 'mutants').PLANTED)} in the state machines" in page("docs/architecture.md")
    assert f"and {len(beside('tests/runtime', 'planted').BUGS)} in the driver" in page("docs/architecture.md")


def test_the_limits_of_the_security_page_are_those_of_the_code() -> None:
    limits, text = Limits(), (ROOT / "docs" / "security.md").read_text()
    assert f"| `LinkLimits.strangers` | {LinkLimits().strangers} |" in text
    early = f"{limits.early_bytes >> 20} MiB, {limits.early_bytes_per_peer >> 20} MiB"
    assert f"| `Limits.early_bytes`, `early_bytes_per_peer` | {early} |" in text


def files() -> set[str]:
    """Return the path of every file of the project, relative to its root."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in found if path.is_file()}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(path: Path) -> None:
    known = [f"/{name}" for name in files()]
    for name in set(re.findall(r"`([\w./-]+\.(?:py|sh))`", path.read_text())):
        wanted = "/" + name.removeprefix("../")
        assert any(one.endswith(wanted) for one in known), f"{path.name} names {name}, which is not there"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_that_a_page_names_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named <= targets, f"{path.name} names {sorted(named - targets)}"


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield the page and the text of each `kvroom` command in a code block that has no placeholder in it."""
    for path in PAGES:
        inside = False
        for line in path.read_text().splitlines():
            inside = inside != line.strip().startswith("```")
            text = line.strip().partition(" #")[0].strip()
            if (inside or line.startswith("    ")) and text.startswith("kvroom ") and not PLACEHOLDER.search(text):
                yield path.name, text


@pytest.mark.parametrize("line", sorted({line for _, line in command_lines()}))
def test_command_lines_of_the_pages_are_accepted(line: str) -> None:
    arguments = shlex.split(line)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            parse(arguments)
    else:
        command, _ = parse(arguments)
        assert command.name == arguments[0]
        if command.name == "soak":  # which hands its arguments to the laboratory
            soak_parser().parse_args(arguments[1:])


def test_there_are_command_lines_to_check() -> None:
    pages = {name for name, _ in command_lines()}
    assert {"README.md", "operating.md", "soak.md", "sglang.md", "vllm.md"} <= pages

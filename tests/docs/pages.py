"""The pages of the documentation as the checks of this folder read them: blocks of code, names in code, prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = ROOT / "CHANGELOG.md"
FROM_SGLANG = ROOT / "docs" / "from-sglang.md"
ALL = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
CURRENT = [page for page in ALL if page != CHANGELOG]
"""The pages that describe the code as it is. The changelog also has names that are gone."""

_FENCE = re.compile(r"^(?P<ticks>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block of code, the line on which its text begins, and its language, `""` where the fence names none."""

    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    """Return the path of a page in the repository, as the id of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = _FENCE.finditer(text)
    return [Block(text.count("\n", 0, one.start("text")) + 1, one["language"], one["text"]) for one in found]


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """Return what stands between single backticks in the prose of a page, on one line each."""
    return [" ".join(one.split()) for one in _SPAN.findall(prose(text))]


def lines_of_code(text: str) -> Iterator[str]:
    """Yield the lines of the blocks of a page, fenced and indented ones, whole where a backslash continues them."""
    for block in blocks(text):
        yield from re.sub(r"\\\n\s*", " ", block.text).splitlines()
    for line in prose(text).splitlines():
        if line.startswith("    "):
            yield line.strip()

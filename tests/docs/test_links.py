"""Links between pages lead to files and headings that exist, by the anchors that GitHub and the site make of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import ALL, ROOT, name_of, prose

FILE = re.compile(r"\]\((?!https?:)([^)#\s]+)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE)}


def dead(text: str, page: Path) -> list[str]:
    """Return the links to headings that are not there, in the text of a page."""
    found = []
    for target, anchor in LINK.findall(prose(text)):
        other = (page.parent / target).resolve() if target else page
        if other.suffix == ".md" and anchor not in (anchors(other) if other.is_file() else ()):
            found.append(f"{target}#{anchor}")
    return found


def lost(text: str, page: Path) -> list[str]:
    """Return the links to files that do not exist, in the text of a page."""
    return [target for target in FILE.findall(text) if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_to_files_lead_there(page: Path) -> None:
    assert lost(page.read_text(), page) == []


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_to_headings_lead_there(page: Path) -> None:
    assert dead(page.read_text(), page) == []


def test_a_dead_link_is_found() -> None:
    page = ROOT / "docs" / "failures.md"
    assert dead("[x](rooms.md#no-such) [y](#none) [z](none.md#a) [w](#when-pages-come-back)", page) == [
        "rooms.md#no-such",
        "#none",
        "none.md#a",
    ]
    assert lost("[x](rooms.md#no-such) [y](nowhere.md) [z](../none.py)", page) == ["nowhere.md", "../none.py"]

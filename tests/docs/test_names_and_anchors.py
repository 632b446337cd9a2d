"""Names of modules, classes and files in the documents are there, and so are the headings that links lead to."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = list((ROOT / "src" / "kvroom").rglob("*.py"))
NOT_IMPORTED = {"kvroom.doubles", "kvroom.adapters.vllm.KVRoomConnector"}
"""A group of entry points, and a name that needs an engine which is not installed here."""
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")]


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings_that_are_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", prose(page)):
        there = (page.parent / target).resolve() if target else page
        assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}, and there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_of_the_library_can_be_imported(page: Path) -> None:
    for name in set(re.findall(r"`(kvroom(?:\.\w+)+)(?:\(\))?`", prose(page))) - NOT_IMPORTED:
        assert resolves(name), f"{page.name} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_library_that_are_named_are_there(page: Path) -> None:
    for name in set(re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|md))`", prose(page))):
        here = (ROOT / name).exists() or (page.parent / name).exists()
        assert here or any(str(path).endswith(f"/{name}") for path in SOURCES), f"{page.name} names {name}, it is gone"


def resolves(name: str) -> bool:
    """Return True if a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_a_name_that_is_not_there_would_be_found() -> None:
    assert resolves("kvroom.core.table.RoomTable")
    assert not resolves("kvroom.core.table.NoSuchTable")
    assert not resolves("kvroom.no_such_module")

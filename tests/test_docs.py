"""What the documents say of the code is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_room_diagrams_are_those_of_the_tables() -> None:
    drawn = subprocess.run([sys.executable, str(ROOT / "scripts" / "draw_rooms.py"), "--check"], check=False)
    assert drawn.returncode == 0, "docs/rooms.md is out of date: run python scripts/draw_rooms.py"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_options_of_the_http_workers_are_those_of_the_code() -> None:
    listed = subprocess.run([sys.executable, str(ROOT / "scripts" / "list_options.py"), "--check"], check=False)
    assert listed.returncode == 0, "docs/http-api.md is out of date: run python scripts/list_options.py"

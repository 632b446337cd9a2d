"""Facts about the code that the pages state are true."""

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


def test_the_options_of_the_transports_are_those_of_the_code() -> None:
    script = ROOT / "scripts" / "list_transport_options.py"
    listed = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert listed.returncode == 0, "docs/transports.md is out of date: run python scripts/list_transport_options.py"


def _named_tests(page: Path) -> list[str]:
    return re.findall(r"`(tests/[a-z_/]+\.py(?:::test_\w+)?)`", page.read_text())


@pytest.mark.parametrize("named", _named_tests(ROOT / "docs" / "security.md"))
def test_a_claim_about_security_names_a_test_that_is_there(named: str) -> None:
    path, _, function = named.partition("::")
    file = ROOT / path
    assert file.exists(), f"docs/security.md names {path}, which is not there"
    assert not function or f"def {function}(" in file.read_text(), f"docs/security.md names {named}, which is not there"


def test_each_claim_about_security_names_a_test() -> None:
    claims = _claims(ROOT / "docs" / "security.md")
    assert claims
    assert not [claim for claim in claims if "`tests/" not in claim.rpartition("|")[0].rpartition("|")[2]]


def _claims(page: Path) -> list[str]:
    """Return the rows of the tables whose last column is `tested in`."""
    found, inside = [], False
    for line in page.read_text().splitlines():
        inside = line.startswith("|") and (inside or line.endswith("| tested in |"))
        if inside and not line.startswith("| ---") and not line.endswith("| tested in |"):
            found.append(line)
    return found

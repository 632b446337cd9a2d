"""Pages and tables that are made from the code are up to date."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .pages import ROOT


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("draw_rooms.py", "docs/rooms.md"),
        ("list_commands.py", "docs/command-line.md"),
        ("list_options.py", "docs/http-api.md"),
        ("list_transport_options.py", "docs/transports.md"),
    ],
)
def test_a_page_is_what_its_script_makes(script: str, page: str) -> None:
    made = subprocess.run([sys.executable, str(ROOT / "scripts" / script), "--check"], check=False)
    assert made.returncode == 0, f"{page} is out of date: run python scripts/{script}"

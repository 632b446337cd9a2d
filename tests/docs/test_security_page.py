"""Each claim of docs/security.md names a test; `test_names.py` checks that these tests exist."""

from __future__ import annotations

from .pages import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


def claims() -> list[str]:
    """Return the rows of the tables whose last column is `tested in`."""
    found, inside = [], False
    for line in PAGE.splitlines():
        inside = line.startswith("|") and (inside or line.endswith("| tested in |"))
        if inside and not line.startswith("| ---") and not line.endswith("| tested in |"):
            found.append(line)
    return found


def test_each_claim_names_a_test() -> None:
    assert claims()
    assert not [claim for claim in claims() if "`tests/" not in claim.rpartition("|")[0].rpartition("|")[2]]

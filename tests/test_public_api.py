"""The public interface is written down: a change of a name, a signature or a field has to be seen in a diff."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTING = ROOT / "scripts" / "list_api.py"
LAZY = ["kvroom", "kvroom.network", "kvroom.status"]


def test_the_public_interface_is_as_it_is_written_down() -> None:
    listed = subprocess.run([sys.executable, LISTING, "--check"], capture_output=True, text=True, check=False)
    assert listed.returncode == 0, f"run `make api` and look at the difference:\n{listed.stdout}{listed.stderr}"


@pytest.mark.parametrize(
    "change",
    ["HandOff.aux: str", "KVManager(changed)", "no_such_name"],
)
def test_a_change_of_it_is_found(change: str, tmp_path: Path) -> None:
    """Change the written file instead of the code: the comparison has to see either."""
    written = (ROOT / "tests" / "public_api.txt").read_text()
    changed = {
        "HandOff.aux: str": written.replace("    aux: bytes\n", "    aux: str\n", 1),
        "KVManager(changed)": written.replace("host: str = '127.0.0.1'", "host: str = '0.0.0.0'", 1),
        "no_such_name": written.replace("\nclass KVPoll", "\nclass NoSuchName\nclass KVPoll", 1),
    }[change]
    assert changed != written
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "scripts" / "list_api.py").write_text(LISTING.read_text())
    (tmp_path / "tests" / "public_api.txt").write_text(changed)
    command = [sys.executable, str(tmp_path / "scripts" / "list_api.py"), "--check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (listed.returncode, listed.stderr) == (1, "")
    assert [line[0] for line in listed.stdout.splitlines()].count("-") == 2  # the line, and the head of the difference


@pytest.mark.parametrize("name", LAZY)
def test_names_that_are_imported_late_are_all_there(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))
    for exported in module.__all__:
        assert getattr(module, exported) is not None
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018 - asking for it is the test

"""The wheel contains the library, its commands and the conformance suite, and not the laboratory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE, LABORATORY = ROOT / "src", ROOT / "lab"
# The wheel instead of this source; what is installed beside them stays.
FROM_THE_WHEEL = """
import sys
wheel, hidden, command = sys.argv[1], sys.argv[2:4], sys.argv[4:]
sys.path[:] = [wheel, *(path for path in sys.path if path not in hidden)]
import kvroom
assert kvroom.__file__.startswith(wheel), kvroom.__file__
from kvroom.cli import main
sys.exit(main(command))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this source."""
    made = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(made)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    (found,) = made.glob("kvroom-*.whl")
    return found


def test_the_wheel_holds_no_file_of_the_laboratory(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        held = {name: packed.read(name) for name in packed.namelist() if ".dist-info/" not in name}
        (names,) = (name for name in packed.namelist() if name.endswith("entry_points.txt"))
        entries = packed.read(names).decode()
    laboratory = {path.read_bytes() for path in LABORATORY.rglob("*.py")}
    assert len(laboratory) > 40
    assert not laboratory & set(held.values())
    parts = {path.stem for path in (LABORATORY / "kvroom_lab").iterdir() if path.stem.isidentifier()} - {
        "__init__",
        "py",
    }
    assert {"explore", "simulation", "soak", "doubles", "ranks"} <= parts
    assert not {name for name in held if name.split("/")[1].removesuffix(".py") in parts}
    assert {name.split("/")[0] for name in held} == {"kvroom"}
    assert "kvroom_lab" not in entries


def test_the_wheel_holds_everything_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        held = {name for name in packed.namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*") if path.is_file()}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {"kvroom/conformance/suite.py", "kvroom/py.typed"} <= held


@pytest.mark.parametrize("arguments", [(), ("--rooms", "5"), ("--help",)], ids=" ".join)
def test_the_soak_of_a_wheel_says_in_one_sentence_how_to_get_it(wheel: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", FROM_THE_WHEEL, str(wheel), str(SOURCE), str(LABORATORY), "soak", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == (
        "kvroom soak: error: the soak is part of kvroom's laboratory, which is not installed: clone the repository of "
        "this version and run `pip install -e lab` in it\n"
    )


def test_the_conformance_suite_of_a_wheel_runs(wheel: Path) -> None:
    suite = FROM_THE_WHEEL.replace("kvroom.cli", "kvroom.conformance.suite")
    only = "moves_scattered_unaligned_blocks"
    command = [
        sys.executable,
        "-c",
        suite,
        str(wheel),
        str(SOURCE),
        str(LABORATORY),
        "memory",
        "--one-process",
        "--only",
        only,
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert "memory: 1 checks, 0 failed" in said.stdout

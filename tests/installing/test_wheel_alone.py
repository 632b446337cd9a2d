"""The wheel without extras: every command works, or names in one line the extra that it needs.

Each version of Python gets an environment of its own with the wheel and the library's dependencies. A version that this
machine does not have is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import kvroom
from kvroom.cli.parser import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
WITHIN_S = 240
NEEDS = {
    (
        "prefill",
    ): "`kvroom prefill` needs torch, transformers, jinja2 and prometheus-client, which kvroom's extra 'serve'",
    (
        "decode",
    ): "`kvroom decode` needs torch, transformers, jinja2 and prometheus-client, which kvroom's extra 'serve'",
    ("router", "--prefill", "http://a:1", "2", "--decode", "http://b:3"): "`kvroom router` needs smg, which kvroom's",
    ("up",): "prometheus-client and smg, which kvroom's extra 'serve' brings",
    ("demo",): "which kvroom's extra 'demo' brings",
    ("rooms", "http://127.0.0.1:9"): "`kvroom rooms` needs rich, which kvroom's extra 'cli' brings",
    ("completion", "bash"): "`kvroom completion` needs shtab, which kvroom's extra 'cli' brings",
    ("soak",): "the soak is part of kvroom's laboratory, which is not installed",
}
"""Commands that need more, and what they say."""


class Installed(NamedTuple):
    """An environment in which the wheel is installed."""

    python: Path
    directory: Path
    """An empty directory, in which commands run."""

    def run(self, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        """Run Python with nothing of this process's environment."""
        environ = {"HOME": str(self.directory), "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": path}
        return subprocess.run(
            [self.python, *arguments],
            env=environ, cwd=self.directory, capture_output=True, text=True, timeout=WITHIN_S, check=False,
        )  # fmt: skip

    def kvroom(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the program `kvroom`."""
        return self.run(str(self.python.with_name("kvroom")), *arguments)


def interpreter(version: str) -> str | None:
    """Return a Python of this version, or None: this one, one on the path, or one of pyenv."""
    if "{}.{}".format(*sys.version_info) == version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"versions/{version}.*/bin/python"))]
    for path in filter(None, found):
        shown = subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True, check=False)
        if shown.returncode == 0:
            return path
    return None


def must(*command: str | Path, environ: Mapping[str, str] | None = None) -> None:
    """Run a command that has to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wheel")
    must(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", made)
    (found,) = made.glob("kvroom-*.whl")
    return found


@pytest.fixture(
    scope="module", params=[pytest.param(one, marks=pytest.mark.xdist_group(f"python{one}")) for one in VERSIONS]
)
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"this machine has no Python {request.param} that can make an environment")
    folder = tmp_path_factory.mktemp("environment")
    must(python, "-m", "venv", folder / "venv")
    here = Installed(folder / "venv" / "bin" / "python", folder)
    must(here.python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", wheel)
    yield here
    shutil.rmtree(folder)


def test_the_version_is_the_same_everywhere(installed: Installed) -> None:
    assert installed.run("-c", "import kvroom; print(kvroom.__version__)").stdout == f"{kvroom.__version__}\n"
    assert installed.kvroom("--version").stdout == f"kvroom {kvroom.__version__}\n"


def test_the_example_hands_over(installed: Installed) -> None:
    shown = installed.run(str(ROOT / "examples" / "handoff.py"))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.endswith("first token: 42\n")


def test_doctor_says_what_to_install(installed: Installed) -> None:
    shown = installed.kvroom("doctor")
    assert (shown.returncode, shown.stderr) == (0, "")
    first, *lines = shown.stdout.splitlines()
    assert first.startswith("this machine can hand over KV caches: ")
    assert any("pip install torch" in line for line in lines)


def test_a_soak_from_the_source(installed: Installed) -> None:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "lab")))
    shown = installed.run("-m", "kvroom", "soak", "--rooms", "300", path=path)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.endswith("every byte right, nothing left\n")


def test_every_command_has_help(installed: Installed) -> None:
    assert installed.kvroom().stdout == installed.kvroom("--help").stdout
    for command in COMMANDS:
        shown = installed.kvroom(command.name, "--help")
        assert "Traceback" not in shown.stderr
        if command.name != "soak":  # its help is the laboratory's
            assert (shown.returncode, shown.stderr) == (0, "")
            assert f"usage: kvroom {command.name} " in shown.stdout


@pytest.mark.parametrize("arguments", NEEDS, ids=lambda one: one[0])
def test_a_command_that_needs_more_says_so_in_one_line(installed: Installed, arguments: tuple[str, ...]) -> None:
    shown = installed.kvroom(*arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    (line,) = shown.stderr.splitlines()
    assert NEEDS[arguments] in line


def test_fence_works_and_gets_no_answer(installed: Installed) -> None:
    shown = installed.kvroom("fence", "10.0.0.9", "http://127.0.0.1:9")
    assert shown.returncode == 3
    assert "http://127.0.0.1:9: no answer: connection refused" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_each_command_is_tried() -> None:
    assert {one[0] for one in NEEDS} | {"fence", "doctor"} == {command.name for command in COMMANDS}

"""A converted model directory is made once, as a whole or not at all, with one clear error if the disk is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvroom.engine.converted import build_once
from kvroom.errors import ConfigurationError

SAVING = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from kvroom.engine.converted import build_once
from kvroom.errors import ConfigurationError

def save(directory):
    directory.mkdir()
    (directory / "config.json").write_text("x" * 1000)
    save_file({"weight": np.zeros(100_000)}, directory / "model.safetensors")

for limit in (100, 10_000):  # bytes of a file; writing stops there, as on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        build_once(Path(sys.argv[1]), save, 1 << 20, lambda line: None, "building")
    except ConfigurationError as error:
        print(error)
"""


def test_a_disk_that_fills_is_one_clear_sentence_and_nothing_stays(tmp_path: Path) -> None:
    """In a separate process the disk is too small, first for the configuration, then for the weights."""
    target = tmp_path / "models" / "tiny"
    command = [sys.executable, "-c", SAVING, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for said in lines:
        assert said.startswith(f"the packaged model cannot be converted into {target}: ")
        assert "file too large" in said.lower()
        assert said.endswith(": free 1 MiB there, or set XDG_CACHE_HOME to a writable directory with that much space")
    assert [path.name for path in target.parent.iterdir()] == ["tiny.lock"]


def test_a_disk_without_room_is_named_before_anything_is_built(tmp_path: Path) -> None:
    def never(_directory: Path) -> None:
        raise AssertionError("it was built")

    target = tmp_path / "tiny"
    with pytest.raises(ConfigurationError, match=r"no space left on device, \d+ MiB are free: free \d+ MiB there"):
        build_once(target, never, 1 << 60, lambda _line: None, "building")
    assert not target.exists()


def test_what_fails_while_it_builds_leaves_nothing_and_is_built_again(tmp_path: Path) -> None:
    def fails(directory: Path) -> None:
        directory.mkdir()
        (directory / "half").write_text("half")
        raise ValueError("a fault of another kind")

    target = tmp_path / "tiny"
    with pytest.raises(ValueError, match="a fault of another kind"):
        build_once(target, fails, 1, lambda _line: None, "building")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.lock"]
    build_once(target, Path.mkdir, 1, lambda _line: None, "building")
    build_once(target, fails, 1 << 60, lambda _line: None, "building")
    assert target.is_dir()

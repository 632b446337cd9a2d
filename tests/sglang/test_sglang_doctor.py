"""`kvroom doctor` beside the real SGLang."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import msgspec

from kvroom.cli.doctor import Document
from kvroom.cli.engines import Engine


def test_it_names_the_version_and_the_double_and_finds_nothing_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvroom", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    (_, engine) = msgspec.json.decode(done.stdout, type=Document).engines
    double = "sgl_kernel, the kernels of SGLang's CPU engine (tests/sglang/shim of kvroom)"
    assert msgspec.structs.replace(engine, remedy="") == Engine(
        "SGLang", importlib.metadata.version("sglang"), ("0.5.23",), works=True, double=double
    )

"""Engines that kvroom plugs into, as `kvroom doctor` reports them: the installed version, and what it lacks.

Python's metadata says whether an engine is installed. Only if it is, a process of its own imports it: an import of
SGLang takes seconds, prints warnings, and can end the process that does it.

    python -m kvroom.cli.engines    # that process; the last line that it prints is a JSON list of what is missing
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec

from kvroom.adapters.sglang import chosen, plugin

WITHIN_S = 120.0
_GROUP = "sglang.srt.plugins"
_DOUBLE = ("tests", "sglang", "shim", "sgl_kernel")


class Engine(msgspec.Struct, frozen=True):
    """One engine. `version` is None if it is not installed; `works` is False if anything is missing."""

    engine: str
    version: str | None
    tested: tuple[str, ...]
    works: bool
    missing: tuple[str, ...] = ()
    double: str = ""
    """A part that only imitates the real one, for tests; "" if there is none."""


def sglang() -> Engine:
    """Look for SGLang. If it is installed this imports it in another process, which takes seconds."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return Engine("SGLang", None, plugin.TESTED, works=False)
    missing = []
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and plugin.NAME not in [name.strip() for name in allowed.split(",")]:
        missing.append(f"{plugin.NAME} in the variable SGLANG_PLUGINS, which is {allowed!r}")
    elif not importlib.metadata.entry_points(group=_GROUP, name=plugin.NAME):
        missing.append(
            f"kvroom's entry point in the group {_GROUP}: install kvroom with pip into the environment of SGLang"
        )
    # Another process finds out which names the adapter needs and this SGLang lacks.
    command = [sys.executable, "-m", "kvroom.cli.engines"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        missing.append(f"an answer: importing SGLang timed out after {WITHIN_S:g} s")
    else:
        if done.returncode == 0:
            missing += msgspec.json.decode(done.stdout.splitlines()[-1], type=list[str])
        else:
            said = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            missing.append(f"an SGLang that can be imported: its import ended with status {done.returncode}: {said}")
    spec = importlib.util.find_spec("sgl_kernel")
    is_double = spec is not None and spec.origin is not None and Path(spec.origin).parts[-5:-1] == _DOUBLE
    double = "sgl_kernel, the kernels of SGLang's CPU engine (tests/sglang/shim of kvroom)" if is_double else ""
    return Engine("SGLang", version, plugin.TESTED, works=not missing, missing=tuple(missing), double=double)


def main() -> None:
    """Import the installed SGLang and print what it lacks."""
    warnings.simplefilter("ignore")
    logging.disable()
    print(json.dumps(plugin.lacking() or chosen.lacking()))


if __name__ == "__main__":
    main()

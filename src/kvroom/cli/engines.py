"""The engines that kvroom plugs into, as `kvroom doctor` reports them: the installed version, and what is missing.

Python's package metadata tells if an engine is installed. If it is, a separate process imports it, because an import of
SGLang takes seconds, prints warnings, and can end the process that does it.

    python -m kvroom.cli.engines    # that process: the last line of its output is a JSON list of what is missing
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
    """One engine in the report of `kvroom doctor`."""

    engine: str
    """The engine's name."""
    version: str | None
    """The installed version; None if the engine is not installed."""
    tested: tuple[str, ...]
    """The versions that kvroom is tested with."""
    works: bool
    """True if the engine is installed and nothing is missing."""
    missing: tuple[str, ...] = ()
    """One phrase for each thing that is missing."""
    double: str = ""
    """A part of the engine that is replaced by an imitation for tests; "" if there is none."""


def sglang() -> Engine:
    """Report on SGLang. If SGLang is installed, another process imports it, which takes seconds."""
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
    # The other process looks for the names in SGLang that the adapter needs.
    command = [sys.executable, "-m", "kvroom.cli.engines"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        missing.append(f"an answer: importing SGLang timed out after {WITHIN_S:g} s")
    else:
        if done.returncode == 0:
            missing += msgspec.json.decode(done.stdout.splitlines()[-1], type=list[str])
        else:
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            missing.append(f"an SGLang that can be imported: the import ended with status {done.returncode}: {last}")
    spec = importlib.util.find_spec("sgl_kernel")
    is_double = spec is not None and spec.origin is not None and Path(spec.origin).parts[-5:-1] == _DOUBLE
    double = "sgl_kernel, the kernels of SGLang's CPU engine (tests/sglang/shim of kvroom)" if is_double else ""
    return Engine("SGLang", version, plugin.TESTED, works=not missing, missing=tuple(missing), double=double)


def main() -> None:
    """Import the installed SGLang and print the list of what the adapter needs and SGLang lacks, as JSON."""
    warnings.simplefilter("ignore")
    logging.disable()
    print(json.dumps(plugin.lacking() or chosen.lacking()))


if __name__ == "__main__":
    main()

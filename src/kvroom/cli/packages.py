"""The optional packages of the commands, as `kvroom doctor` reports them: versions, and how to get them.

Python's package metadata and files tell all of it, so nothing is imported. The exception is a torch that is built for
GPUs on a machine that has some: a separate process asks it if it can use them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvroom.engine.packaged import INSTALL, PACKAGE, locate
from kvroom.errors import ConfigurationError
from kvroom.tested import TESTED, remark

WITHIN_S = 60.0
_BUILD = re.compile(r"^(cuda|hip)\b[^=\n]*= *['\"]([^'\"]+)['\"]", re.MULTILINE)
_ASK = "import torch; print(torch.cuda.is_available())"


class _Wanted(NamedTuple):
    module: str
    use: str


_WANTED = {
    "torch": _Wanted("torch", "workers"),
    "transformers": _Wanted("transformers", "workers"),
    "jinja2": _Wanted("jinja2", "workers"),
    "smg": _Wanted("smg", "router"),
    PACKAGE: _Wanted(PACKAGE.replace("-", "_"), "model"),
    "accelerate": _Wanted("accelerate", "conversion"),
    "gguf": _Wanted("gguf", "conversion"),
    "rich": _Wanted("rich", "terminal"),
    "prometheus-client": _Wanted("prometheus_client", "metrics"),
}
_REQUIREMENTS = {"transformers": "'transformers>=5,<6'", "smg": "'smg>=1.13,<2'"}


class Package(msgspec.Struct, frozen=True):
    """One optional package in the report of `kvroom doctor`."""

    package: str
    """The name of the distribution."""
    version: str | None
    """The installed version; None if the package is not installed."""
    tested: tuple[str, ...]
    """The versions that kvroom is tested with."""
    use: str
    """The use of it: "workers", "router", "model", "conversion" (of the packaged model), "terminal" or "metrics"."""
    note: str = ""
    """Further facts, such as torch's build."""
    uses_gpus: bool | None = None
    """For torch on a machine with GPUs: True if it can use them. None for all else."""

    def shown(self) -> str:
        """Return version, tested versions and note as one phrase."""
        if self.version is None:
            return f"not installed; tested with {', '.join(self.tested)}"
        return "; ".join(filter(None, (f"{self.version} is installed", remark(self.package, self.version), self.note)))


def packages(gpus: int) -> tuple[Package, ...]:
    """Report on each optional package. `gpus` is the number of GPUs of this machine that torch could use."""
    return tuple(_examined(name, gpus) for name in _WANTED)


def install(names: list[str]) -> str:
    """Return the command that installs these packages."""
    plain = [_REQUIREMENTS.get(name, name) for name in names if name != PACKAGE]
    commands = [INSTALL] if PACKAGE in names else []
    return " && ".join([*commands, *([f"pip install {' '.join(plain)}"] if plain else [])])


def _examined(name: str, gpus: int) -> Package:
    wanted, version, note, uses_gpus = _WANTED[name], None, "", None
    spec = importlib.util.find_spec(wanted.module)
    if spec is not None:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "an unknown version"
        if name == "torch" and spec.origin is not None:
            note, uses_gpus = _torch(Path(spec.origin), gpus)
        elif name == PACKAGE:
            note, version = _model(version)
    return Package(name, version, TESTED[name], wanted.use, note, uses_gpus)


def _torch(origin: Path, gpus: int) -> tuple[str, bool | None]:
    """Return the build of the torch in this folder, and if it can use the GPUs of this machine (None without GPUs)."""
    try:
        build = _BUILD.search((origin.parent / "version.py").read_text())
    except OSError:
        build = None
    if build is None:
        return "CPU build", False if gpus else None
    name = f"{'CUDA' if build[1] == 'cuda' else 'ROCm'} {build[2]} build"
    if not gpus:
        return f"{name}, no GPU here", None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{name}; importing it timed out after {WITHIN_S:g} s", False
    usable = done.returncode == 0 and done.stdout.split()[-1:] == ["True"]
    return f"{name}, {'can' if usable else 'cannot'} use the GPUs here", usable


def _model(version: str) -> tuple[str, str | None]:
    """Return if the packaged model is converted, and its version, or None if the package lacks the model's file."""
    try:
        _, converted = locate()
    except ConfigurationError:
        return "", None
    return "converted" if converted.is_dir() else "converted at the first use", version

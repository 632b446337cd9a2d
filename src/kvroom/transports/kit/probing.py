"""Probes: whether a transport can run on this machine, with which version of its engine, and what is missing.

Each transport's module has a function `probe() -> ProbeResult`, which is all that `auto` and `kvroom doctor` use. A
probe is fast and starts nothing: it looks for packages, libraries and device files, and imports no wheel.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import msgspec

DOUBLES_GROUP = "kvroom.doubles"
"""The entry point group in which an installed package registers doubles, as a transport's name and a module."""

_DEV = Path("/dev")
_RDMA = Path("/sys/class/infiniband")
_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


class Missing(msgspec.Struct, frozen=True):
    """One requirement of a transport that is missing here."""

    what: str
    """The requirement, as a noun phrase: "the library libibverbs.so.1"."""
    kind: str
    """"package", "system package", "device", "driver" or "permission"."""
    remedy: str
    """The command to run or the change to make."""


class ProbeResult(msgspec.Struct, frozen=True):
    """The result of probing a transport on this machine."""

    part: str
    """The package that does the work, with its version."""
    missing: tuple[Missing, ...] = ()
    """The missing requirements; empty if the transport can run."""
    devices: tuple[str, ...] = ("cpu",)
    """The kinds of memory that it moves here."""
    fast: bool = False
    """True if there is hardware that only this transport drives well (RDMA, NVLink, ...); `auto` then prefers it to
    sockets."""
    notes: tuple[str, ...] = ()
    """Further facts for operators, which `kvroom doctor` lists."""
    exposes: str = ""
    """The way in which processes without the secret could reach registered memory, as a predicate ("uses memfabric,
    which checks no secret"), or "". `auto` leaves out such a transport unless the operator trusts the network."""

    @property
    def runs(self) -> bool:
        """True if the transport can run on this machine with its real engine."""
        return not self.missing


def package(distribution: str, module: str) -> tuple[str, tuple[Missing, ...]]:
    """Return "distribution version" and, if its module cannot be found, what to install. Imports nothing."""
    try:
        name = f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        name = distribution
    top = module.partition(".")[0]  # to find a submodule, find_spec would import the package
    if importlib.util.find_spec(top) is not None:
        return name, ()
    return name, (Missing(f"the Python package {distribution}", "package", f"pip install {distribution}"),)


def library(soname: str, debian: str) -> tuple[Missing, ...]:
    """Return what to install if this shared library cannot be loaded."""
    try:
        ctypes.CDLL(soname)
    except OSError as error:
        return (Missing(f"the library {soname} ({error})", "system package", f"apt-get install {debian}"),)
    return ()


def installed_doubles() -> dict[str, str]:
    """Return the modules of the installed doubles, by transport, without importing them.

    Doubles stand in for engines whose hardware is not available. They are used only if the transport's option names
    them.
    """
    return {point.name: point.value for point in importlib.metadata.entry_points(group=DOUBLES_GROUP)}


def rdma_devices() -> list[str]:
    """Return the names of this machine's RDMA devices, such as "mlx5_0"."""
    try:
        return sorted(os.listdir(_RDMA))
    except OSError:
        return []


def nvidia_gpus() -> int:
    """Return the number of NVIDIA GPUs that have a device file here."""
    return _numbered("nvidia")


def ascend_npus() -> int:
    """Return the number of Ascend NPUs that have a device file here."""
    return _numbered("davinci")


def amd_gpus() -> int:
    """Return the number of AMD GPUs of the kernel's compute driver. Its nodes without a GPU's id are processors."""
    if not (_DEV / "kfd").exists():
        return 0
    gpus = 0
    for path in _KFD_NODES.glob("*/gpu_id"):
        with contextlib.suppress(OSError):  # the id of another container's GPU is not readable
            gpus += path.read_text().strip() not in ("", "0")
    return gpus


def _numbered(prefix: str) -> int:
    return len([path for path in _DEV.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()])

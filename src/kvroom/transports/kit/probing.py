"""What a transport says of the machine that it is on: can it run here, with which part, and what is missing.

Each transport's module has a function `probe() -> ProbeResult`; `auto` and `kvroom doctor` read them and know
nothing more.
A probe is quick and starts nothing: it looks for packages, libraries and device files, and imports no wheel.
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
"""The group of entry points under which an installed package offers doubles: a transport's name, and the module."""

_DEV = Path("/dev")
_RDMA = Path("/sys/class/infiniband")
_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")


class Missing(msgspec.Struct, frozen=True):
    """One thing that a transport lacks here. `kind`: "package", "system package", "device", "driver", "permission"."""

    what: str
    kind: str
    remedy: str


class ProbeResult(msgspec.Struct, frozen=True):
    """`part` is what does the work, with its version. `missing` is empty where the transport can run.

    `devices`: kinds of memory that it moves here. `fast`: there is hardware that only it drives well (RDMA, NVLink,
    ...), so that `auto` should prefer it to sockets. `exposes`: what puts registered memory within reach of strangers,
    a verb and its object, so that `auto` leaves it out where the operator has not declared the network trusted.
    """

    part: str
    missing: tuple[Missing, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    fast: bool = False
    notes: tuple[str, ...] = ()
    exposes: str = ""

    @property
    def runs(self) -> bool:
        """Whether the transport can run on this machine, with its real part."""
        return not self.missing


def package(distribution: str, module: str, extra: str) -> tuple[str, tuple[Missing, ...]]:
    """Return "distribution version" and, if its module cannot be found, what to install. Imports nothing."""
    try:
        name = f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        name = distribution
    top = module.partition(".")[0]  # to look for what is inside, it would have to be imported
    if importlib.util.find_spec(top) is not None:
        return name, ()
    return name, (Missing(f"the Python package {distribution}", "package", f"pip install 'kvroom[{extra}]'"),)


def library(soname: str, debian: str) -> tuple[Missing, ...]:
    """Return what to install if this shared library cannot be loaded."""
    try:
        ctypes.CDLL(soname)
    except OSError as error:
        return (Missing(f"the library {soname} ({error})", "system package", f"apt-get install {debian}"),)
    return ()


def installed_doubles() -> dict[str, str]:
    """Return the modules that stand in for the parts of transports in tests, by transport. Imports none of them.

    The hardware of these parts cannot be had everywhere. A double is never used unless the transport's option names it.
    """
    return {point.name: point.value for point in importlib.metadata.entry_points(group=DOUBLES_GROUP)}


def rdma_devices() -> list[str]:
    """Return the names of the RDMA devices that the kernel has, such as "mlx5_0"."""
    try:
        return sorted(os.listdir(_RDMA))
    except OSError:
        return []


def nvidia_gpus() -> int:
    """Return how many NVIDIA GPUs have a device file here."""
    return _numbered("nvidia")


def ascend_npus() -> int:
    """Return how many Ascend NPUs have a device file here."""
    return _numbered("davinci")


def amd_gpus() -> int:
    """Return how many AMD GPUs the kernel's compute driver has; its nodes without a GPU's id are processors."""
    if not (_DEV / "kfd").exists():
        return 0
    gpus = 0
    for path in _KFD_NODES.glob("*/gpu_id"):
        with contextlib.suppress(OSError):  # another container's: its id is not ours to read
            gpus += path.read_text().strip() not in ("", "0")
    return gpus


def _numbered(prefix: str) -> int:
    return len([path for path in _DEV.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()])

"""NUMA nodes of this machine, of this process and of its GPUs and RDMA devices, as Linux lists them under /sys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_RDMA = Path("/sys/class/infiniband")
_GPU_MAKERS = ("0x10de", "0x1002")  # NVIDIA, AMD
_GPU_CLASSES = ("0x03", "0x12")  # display controllers and processing accelerators


def node_cpus() -> dict[int, set[int]]:
    """Return the processors of each node that has some. Empty if the kernel lists no nodes."""
    found = {}
    for path in sorted(_NODES.glob("node[0-9]*")):
        cpus = set(_parse(_read(path / "cpulist")))
        if cpus:
            found[int(path.name.removeprefix("node"))] = cpus
    return found


def nodes_of_process() -> tuple[int, ...]:
    """Return the nodes that this process may run on."""
    allowed = os.sched_getaffinity(0)
    return tuple(sorted(node for node, cpus in node_cpus().items() if cpus & allowed))


def nodes_of_devices() -> dict[str, int]:
    """Return the node of each GPU and RDMA device of which the kernel knows it, by the device's name."""
    found = {}
    for path in sorted(_PCI.glob("*")):
        if _read(path / "vendor") in _GPU_MAKERS and _read(path / "class").startswith(_GPU_CLASSES):
            found[f"GPU {path.name}"] = _read(path / "numa_node")
    for path in sorted(_RDMA.glob("*")):
        found[path.name] = _read(path / "device" / "numa_node")
    return {name: int(node) for name, node in found.items() if node.isdigit()}  # "-1" if the firmware does not say


def _parse(cpulist: str) -> Iterator[int]:
    """Yield the processors of a list such as "0-3,8"."""
    for part in filter(None, cpulist.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""

"""The reports of `kvroom doctor`: this machine, its transports and the choice of `auto`; and two machines compared.

A `MachineReport` contains all that is needed to compare two machines, so it can be saved and sent. It contains no
secret, address or path. Making one is fast and starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvroom.transports import REGISTRY
from kvroom.transports.kit import machine
from kvroom.transports.kit.probing import amd_gpus, ascend_npus, installed_doubles, nvidia_gpus, rdma_devices

from . import numa
from .choice import TransportReport, Verdict, report_on, verdicts

FORMAT = 1
"""The version of the format of reports. It increases when a field changes its meaning or is removed."""

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
_SHM = Path("/dev/shm")


class Machine(msgspec.Struct, frozen=True):
    """The machine as this process sees it."""

    host: str
    """The host name."""
    boot: str
    """The boot id. Two reports with the same one come from the same machine."""
    pid_namespace: int
    """An inode number. Two containers of a machine usually have different ones."""
    uid: int
    """The user that this process runs as."""
    kernel: str
    """The release of the kernel."""
    python: str
    """The version of Python."""
    kvroom: str
    """The version of kvroom, or "not installed"."""
    cores: int
    """The number of cores that this process may use."""
    rdma_devices: tuple[str, ...]
    """The names of the RDMA devices, such as "mlx5_0"."""
    nvidia_gpus: int
    amd_gpus: int
    ascend_npus: int
    yama_scope: int | None
    """Yama's ptrace_scope, 0 to 3; None if the kernel has no Yama."""
    memlock_bytes: int | None
    """The limit on locked memory of this process (RLIMIT_MEMLOCK); None for unlimited."""
    transparent_huge_pages: str | None
    """The kernel's mode, "always", "madvise" or "never"; None if the kernel has none."""
    huge_pages: int | None
    """The number of reserved huge pages; None if the kernel has none."""
    shm_bytes: int | None
    """The size of /dev/shm; None if it does not exist."""
    shm_free_bytes: int | None
    """The free space of /dev/shm; None if it does not exist."""
    numa_nodes: int = 1
    """The number of NUMA nodes that have processors."""
    process_numa_nodes: tuple[int, ...] = ()
    """The NUMA nodes that this process may run on, by number."""
    device_numa_nodes: dict[str, int] = {}
    """The NUMA node of each GPU ("GPU 0000:17:00.0") and RDMA device ("mlx5_0"), where the kernel knows it."""

    def memory_kinds(self) -> tuple[str, ...]:
        """Return the kinds of memory that a pool can use here: "cpu", "cuda" (also for AMD, as in torch), "npu"."""
        kinds = {"cuda": self.nvidia_gpus + self.amd_gpus, "npu": self.ascend_npus}
        return ("cpu", *(kind for kind, count in kinds.items() if count))


class AutoChoice(msgspec.Struct, frozen=True):
    """The choice of `auto` for memory of one kind."""

    memory: str
    """The kind of memory: "cpu", "cuda" or "npu"."""
    here: str | None
    """The transport to processes of the same machine, container and user, or None."""
    elsewhere: str | None
    """The transport to all other processes, or None."""
    verdicts: tuple[Verdict, ...]
    """The decision on each transport, in order of preference."""


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report on one machine. A reader checks `format` before anything else."""

    format: int = FORMAT
    """The version of the format, `FORMAT`."""
    machine: Machine
    transports: tuple[TransportReport, ...]
    """One report for each transport of the registry but `auto`, in order of preference."""
    choices: tuple[AutoChoice, ...]
    """The choice of `auto` for each kind of memory that the machine has."""


class Pairing(msgspec.Struct, frozen=True):
    """The verdict on one transport between two machines."""

    transport: str
    works: bool
    """True if the transport can run on both machines and reach from one to the other."""
    reason: str
    """The reason against it, or a warning if it works, or ""."""


class Way(msgspec.Struct, frozen=True):
    """The choice of `auto` on one machine for writes into memory of the other."""

    writer: str
    """The name of the machine that writes."""
    reader: str
    """The name of the machine whose memory is written."""
    memory: str
    """The kind of memory: "cpu", "cuda" or "npu"."""
    transport: str | None
    """The transport that `auto` would choose, or None if no transport works."""
    passed_over: tuple[str, ...]
    """The candidates that `auto` prefers to it, each with the reason against it."""


class Between(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of two machines."""

    format: int = FORMAT
    """The version of the format, `FORMAT`."""
    names: tuple[str, str]
    """The names that the caller gave the machines."""
    machines: tuple[str, str]
    """Their host names."""
    together: str
    """The place of the two ends: one machine, two containers or users of it, or two machines; a phrase."""
    pairings: tuple[Pairing, ...]
    """The verdict on each transport, in the order of the first report."""
    ways: tuple[Way, ...]
    """The choices of `auto`, in both directions, for each kind of memory that both machines have."""


def examine(trusted_fabric: bool = False) -> MachineReport:
    """Examine this machine. Fast: starts no engine, and only probes for packages, libraries and devices.

    Args:
        trusted_fabric: True if the operator trusts every host that can reach the ports of engines that do not
            authenticate their peers. `auto` may then choose such engines.
    """
    me = machine.Process.current()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shm = os.statvfs(_SHM) if _SHM.is_dir() else None
    reserved, listed = _first_line(_HUGE_PAGES), _first_line(_THP)
    try:
        version = importlib.metadata.version("kvroom")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    here = Machine(
        host=socket.gethostname(),
        boot=me.boot,
        pid_namespace=me.pid_namespace,
        uid=me.uid,
        kernel=platform.release(),
        python=platform.python_version(),
        kvroom=version,
        cores=len(os.sched_getaffinity(0)),
        rdma_devices=tuple(rdma_devices()),
        nvidia_gpus=nvidia_gpus(),
        amd_gpus=amd_gpus(),
        ascend_npus=ascend_npus(),
        yama_scope=machine.yama_scope(),
        memlock_bytes=None if locked == resource.RLIM_INFINITY else locked,
        transparent_huge_pages=listed and listed.partition("[")[2].partition("]")[0],  # "always [madvise] never"
        huge_pages=None if reserved is None else int(reserved),
        shm_bytes=shm and shm.f_blocks * shm.f_frsize,
        shm_free_bytes=shm and shm.f_bavail * shm.f_frsize,
        numa_nodes=len(numa.node_cpus()) or 1,
        process_numa_nodes=numa.nodes_of_process(),
        device_numa_nodes=numa.nodes_of_devices(),
    )
    doubles = installed_doubles()
    rows = tuple(report_on(name, doubles.get(name, "")) for name in REGISTRY if name != "auto")
    reach = {row.transport: row.reach for row in rows}
    choices = []
    for kind in here.memory_kinds():
        found = verdicts(rows, {kind}, trusted_fabric)
        taken = [verdict.transport for verdict in found if verdict.taken]
        far = [name for name in taken if reach[name] == "network"]
        choices.append(AutoChoice(kind, next(iter(taken), None), next(iter(far), None), tuple(found)))
    return MachineReport(machine=here, transports=rows, choices=tuple(choices))


def between(
    names: tuple[str, str], reports: tuple[MachineReport, MachineReport], trusted_fabric: bool = False
) -> Between:
    """Compare two machines: which transports work between them, and which `auto` would choose in each direction.

    Args:
        names: The names by which the result calls the machines.
        reports: The reports on the machines, in the same order.
        trusted_fabric: As for `examine`.
    """
    one, other = reports[0].machine, reports[1].machine
    apart = ""  # the reason why `local` cannot work between the two
    if one.boot != other.boot:
        apart = "two machines"
    elif one.pid_namespace != other.pid_namespace:
        apart = "two containers (pid namespaces) of one machine"
    elif one.uid != other.uid:
        apart = f"two users (uid {one.uid} and {other.uid}) of one machine"
    pairings = tuple(_pairing(row, names, reports, apart) for row in reports[0].transports)
    kinds = [kind for kind in one.memory_kinds() if kind in other.memory_kinds()]
    there = (names[0], reports[0]), (names[1], reports[1])
    return Between(
        names=names,
        machines=(one.host, other.host),
        together=apart or "the same machine, container and user",
        pairings=pairings,
        ways=tuple(
            _way(kind, writer, reader, pairings, trusted_fabric)
            for kind in kinds
            for writer, reader in (there, there[::-1])
        ),
    )


def _pairing(
    row: TransportReport, names: tuple[str, str], reports: tuple[MachineReport, MachineReport], apart: str
) -> Pairing:
    name, other = row.transport, next((one for one in reports[1].transports if one.transport == row.transport), None)
    if other is None:
        return Pairing(name, False, f"kvroom on {names[1]} has no such transport")
    for where, end in zip(names, (row, other), strict=True):
        if end.runs != "yes":
            return Pairing(name, False, f"it cannot run on {where}: missing {end.lacks()}")
    if row.reach == "process":
        return Pairing(name, False, "both ends must be in one process")
    if row.reach == "machine" and apart:
        return Pairing(name, False, f"these are {apart}")
    return Pairing(name, True, "" if row.part == other.part else f"the versions differ: {row.part} and {other.part}")


def _way(
    kind: str,
    writer: tuple[str, MachineReport],
    reader: tuple[str, MachineReport],
    pairings: Sequence[Pairing],
    trusted_fabric: bool,
) -> Way:
    """Choose as `AutoTransport` does: the first of the writer's candidates that the reader has and that reaches it."""
    passed_over = []
    theirs = {verdict.transport: verdict for verdict in verdicts(reader[1].transports, {kind}, trusted_fabric)}
    works = {pairing.transport: pairing for pairing in pairings}
    for verdict in verdicts(writer[1].transports, {kind}, trusted_fabric):
        name, pairing, answer = verdict.transport, works.get(verdict.transport), theirs.get(verdict.transport)
        if not verdict.taken:
            passed_over.append(f"{name}: on {writer[0]} {verdict.reason}")
        elif pairing is None or answer is None:
            passed_over.append(f"{name}: kvroom on {reader[0]} has no such transport")
        elif not pairing.works:
            passed_over.append(f"{name}: {pairing.reason}")
        elif not answer.taken:
            passed_over.append(f"{name}: on {reader[0]} {answer.reason}")
        else:
            return Way(writer[0], reader[0], kind, name, tuple(passed_over))
    return Way(writer[0], reader[0], kind, None, tuple(passed_over))


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None

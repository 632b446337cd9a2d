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

from .choice import TransportReport, Verdict, report_on, verdicts

FORMAT = 1
"""The version of the document format. It increases when a field changes its meaning or is removed."""

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
_SHM = Path("/dev/shm")


class Machine(msgspec.Struct, frozen=True):
    """The machine as this process sees it. None means unlimited, or that the kernel does not have the feature."""

    host: str
    boot: str
    pid_namespace: int
    uid: int
    kernel: str
    python: str
    kvroom: str
    cores: int
    rdma_devices: tuple[str, ...]
    nvidia_gpus: int
    amd_gpus: int
    ascend_npus: int
    yama_scope: int | None
    memlock_bytes: int | None
    transparent_huge_pages: str | None
    huge_pages: int | None
    shm_bytes: int | None
    shm_free_bytes: int | None

    def memory_kinds(self) -> tuple[str, ...]:
        """Return the kinds of memory that a pool can use here. torch calls AMD's devices "cuda", too."""
        kinds = {"cuda": self.nvidia_gpus + self.amd_gpus, "npu": self.ascend_npus}
        return ("cpu", *(kind for kind, count in kinds.items() if count))


class AutoChoice(msgspec.Struct, frozen=True):
    """The choice of `auto` for memory of one kind."""

    memory: str
    here: str | None
    """The transport to processes of the same machine, container and user, or None."""
    elsewhere: str | None
    """The transport to all other processes, or None."""
    verdicts: tuple[Verdict, ...]


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report on one machine. A reader checks `format` before anything else."""

    format: int = FORMAT
    machine: Machine
    transports: tuple[TransportReport, ...]
    choices: tuple[AutoChoice, ...]


class Pairing(msgspec.Struct, frozen=True):
    """The verdict on one transport between two machines, with the reason against it or a warning."""

    transport: str
    works: bool
    reason: str


class Way(msgspec.Struct, frozen=True):
    """The transport by which `auto` on `writer` would write into memory of `reader`, or None.

    `passed_over` lists the candidates before it, each with its reason.
    """

    writer: str
    reader: str
    memory: str
    transport: str | None
    passed_over: tuple[str, ...]


class Between(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of two machines, with the names that the caller gave them and their own host names."""

    format: int = FORMAT
    names: tuple[str, str]
    machines: tuple[str, str]
    together: str
    pairings: tuple[Pairing, ...]
    ways: tuple[Way, ...]


def examine(trusted_fabric: bool = False) -> MachineReport:
    """Examine this machine. `trusted_fabric` has the meaning that it has for `auto`, here and in `between`."""
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
    """Compare two machines: which transports work between them, and which `auto` would take in each direction."""
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

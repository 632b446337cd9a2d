"""The first lines of `kvroom doctor`: what this machine can do with kvroom, and a list of what is missing.

Pure functions of the report, so that tests need no such machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvroom.doctor import AutoChoice, Machine, MachineReport
from kvroom.network import MACHINE_ID_VARIABLE
from kvroom.transports import REGISTRY

from .engines import Engine
from .packages import Package, install

_LOW_MEMLOCK_BYTES = 1 << 30
_INSTALLABLE = {"package", "system package", "permission"}


class Capability(msgspec.Struct, frozen=True):
    """One thing that a user may want to do on this machine."""

    name: str
    """A phrase: "kvroom up", "vLLM pairs"."""
    works: bool
    """True if nothing is missing for it."""
    reason: str = ""
    """The missing thing, or ""."""


class ToDo(msgspec.Struct, frozen=True):
    """One thing that is missing or costs speed, and the remedy."""

    what: str
    """The missing thing, as a noun phrase."""
    why: str
    """The consequence of its absence, as a phrase."""
    remedy: str
    """The command to run or the change to make."""


def capabilities(packages: Sequence[Package], engines: Sequence[Engine]) -> tuple[Capability, ...]:
    """Return what can be started here: workers and router of kvroom's own, the demo, and pairs of other engines."""
    up = _absent(packages, "workers", "router")
    demo = [*up, *_absent(packages, *_for_model(packages))]
    found = [_capability("kvroom up", up), _capability("kvroom demo", demo)]
    for engine in engines:
        lacks = "" if engine.works else engine.missing[0] if engine.version else f"{engine.engine} is not installed"
        found.append(Capability(f"{engine.engine} pairs", engine.works, lacks))
    return tuple(found)


def to_do(
    report: MachineReport, packages: Sequence[Package], engines: Sequence[Engine], *, identified: bool
) -> tuple[ToDo, ...]:
    """Return what is missing, most important first. An engine that is not installed is not missing."""
    groups = (
        (("workers",), "without it no worker of kvroom's own starts (`kvroom up`, `kvroom demo`)"),
        (("router",), "without it `kvroom router`, `kvroom up` and `kvroom demo` have no router"),
        (_for_model(packages), "without it `kvroom demo` and `--model packaged` have no model"),
        (("terminal",), "without it commands cannot print their tables"),
        (("metrics",), "without it `/metrics` is not available"),
    )
    found = []
    for uses, why in groups:
        if names := _absent(packages, *uses):
            found.append(ToDo(", ".join(names), why.replace("it ", "them ", 1) if names[1:] else why, install(names)))
    for package in packages:
        if package.uses_gpus is False:
            remedy = "install the build of torch for this machine's GPUs and driver (pytorch.org names the command)"
            found.append(ToDo("a torch that can use the GPUs", "workers run on the processor only", remedy))
    for engine in engines:
        found += [ToDo(missing, f"{engine.engine} cannot run with kvroom", engine.remedy) for missing in engine.missing]
    found += [*_transports(report), *_machine(report.machine)]
    if not identified:
        why = "without it a reboot of this machine does not prove to peers that its processes have ended"
        found.append(ToDo(MACHINE_ID_VARIABLE, why, f"set {MACHINE_ID_VARIABLE} to an id that only this machine has"))
    return tuple(found)


def verdict_lines(choices: Sequence[AutoChoice], capable: Sequence[Capability], missing: Sequence[ToDo]) -> list[str]:
    """Return the verdict and the list of what is missing."""
    lines = []
    for choice in choices:
        memory = "" if choice.memory == "cpu" else f" in {choice.memory} memory"
        if choice.here is None:
            candidates = ", ".join(name for name, entry in REGISTRY.items() if entry.auto)
            lines.append(f"this machine cannot hand over KV caches{memory}: none of {candidates} can run")
        else:
            reach = f"{choice.here} within this machine, {choice.elsewhere or 'nothing'} to other machines"
            lines.append(f"this machine can hand over KV caches{memory}: {reach}")
    can = [one.name for one in capable if one.works]
    cannot = [f"{one.name} ({one.reason})" for one in capable if not one.works]
    lines += [f"it can run: {', '.join(can)}"] if can else []
    lines += [f"it cannot run: {', '.join(cannot)}"] if cannot else []
    lines += ["", "missing, most important first:" if missing else "nothing is missing"]
    for number, one in enumerate(missing, 1):
        lines += [f"  {number}. {one.what}: {one.why}", f"     get it: {one.remedy}"]
    return lines


def _capability(name: str, absent: Sequence[str]) -> Capability:
    return Capability(
        name, not absent, f"missing {absent[0]}{f' and {len(absent) - 1} more' if absent[1:] else ''}" if absent else ""
    )


def _absent(packages: Sequence[Package], *uses: str) -> list[str]:
    return [one.package for one in packages if one.use in uses and one.version is None]


def _for_model(packages: Sequence[Package]) -> tuple[str, ...]:
    """Return the uses of packages that the packaged model needs. Its conversion happens once."""
    converted = any(one.use == "model" and one.note == "converted" for one in packages)
    return ("model",) if converted else ("model", "conversion")


def _transports(report: MachineReport) -> list[ToDo]:
    """Return what installs the first transport that could drive this machine's hardware, if none of them runs yet."""
    machine = report.machine
    has_hardware = machine.rdma_devices or len(machine.memory_kinds()) > 1
    if not has_hardware or any(row.fast and row.auto and row.runs == "yes" for row in report.transports):
        return []
    for row in report.transports:
        if row.auto and not row.basic and row.missing and {one.kind for one in row.missing} <= _INSTALLABLE:
            why = f"without it `auto` cannot choose {row.transport}, which drives RDMA devices and GPUs"
            return [ToDo(one.what, why, one.remedy) for one in row.missing]
    return []


def _machine(machine: Machine) -> list[ToDo]:
    """Return the settings of the machine that cost speed, for those transports that they matter to."""
    found = []
    low = machine.memlock_bytes is not None and machine.memlock_bytes < _LOW_MEMLOCK_BYTES
    if low and machine.rdma_devices:
        why = "RDMA locks all registered memory, so the registration of a larger pool fails"
        found.append(ToDo("a higher limit on locked memory", why, "`ulimit -l unlimited`, or LimitMEMLOCK=infinity"))
    if machine.transparent_huge_pages == "never":
        why = "`local` and `nixl` move host memory more slowly on small pages"
        remedy = "as root, echo madvise >/sys/kernel/mm/transparent_hugepage/enabled, and restart the workers"
        found.append(ToDo("transparent huge pages", why, remedy))
    nodes = sorted(set(machine.device_numa_nodes.values()))
    if (
        nodes
        and machine.numa_nodes > 1
        and (machine.process_numa_nodes[1:] or machine.process_numa_nodes[0] not in nodes)
    ):
        where = ", ".join(f"{name} is on node {node}" for name, node in sorted(machine.device_numa_nodes.items()))
        mine = ", ".join(map(str, machine.process_numa_nodes))
        why = f"started like this process, a worker runs on nodes {mine}, perhaps far from its device ({where})"
        remedy = (
            f"start each worker on its device's node: numactl --cpunodebind={nodes[0]} --membind={nodes[0]} kvroom ..."
        )
        found.append(ToDo("a NUMA node for each worker", why, remedy))
    return found

"""What `kvroom doctor` found out, as lines for people.

A report may come from elsewhere: what it says is shown, but no control code of it reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvroom.cli.engines import Engine
from kvroom.runtime.machine_id import MACHINE_ID_VARIABLE
from kvroom.transports.selection.choice import Row
from kvroom.transports.selection.doctor import AutoChoice, Between, Machine, MachineReport, Pairing

_MEMORY = {"cpu": "host memory", "cuda": "GPU memory (cuda)", "npu": "NPU memory (npu)"}
_REACH = {"process": "within one process", "machine": "within one machine", "network": "to any machine"}
_YAMA: dict[int | None, str] = {
    None: "not in this kernel",
    0: "0: no restriction",
    1: "1: kvroom lets the processes of its user write, as `local` needs it",
    2: "2: `local` (vm) needs CAP_SYS_PTRACE; shared pools work without",
    3: "3: `local` (vm) is forbidden; shared pools work",
}
_LITTLE_MEMLOCK_BYTES = 1 << 30
_WIDTH = 13  # of the names of what a machine has


def report_lines(report: MachineReport) -> list[str]:
    """One machine: its transports, what `auto` would choose, and what it has."""
    lines = ["transports, in the order in which `auto` prefers them:"]
    for row in report.transports:
        lines += _transport(row)
    for choice in report.choices:
        lines += ["", *_choice(choice)]
    lines += ["", "this machine:", *_columns(_facts(report.machine), _WIDTH)]
    return [_clean(line) for line in lines]


def identity_line(identified: bool) -> str:
    """Return how far peers know this machine, so that its reboot proves the end of what it ran before."""
    unknown = f"not known to peers, so that a reboot is no proof to them: set {MACHINE_ID_VARIABLE}"
    return _columns([("identity", "known to peers" if identified else unknown)], _WIDTH)[0]


def engine_lines(engines: Sequence[Engine]) -> list[str]:
    """Return what is known of the engines beside kvroom: which version, and if kvroom can be chosen there."""
    lines = ["", "engines beside kvroom:"]
    for engine in engines:
        lines += _engine(engine)
    return [_clean(line) for line in lines]


def between_lines(found: Between) -> list[str]:
    """Two machines: which transports work between them, and which `auto` would take each way."""
    first, second = found.names
    lines = [f"{first} ({found.machines[0]}) and {second} ({found.machines[1]}): {found.together}"]
    lines += ["", "transports that can carry blocks between them:"]
    lines += _columns([(one.transport, _pairing(one)) for one in found.pairings])
    for way in found.ways:
        lines += ["", f"{way.writer} -> {way.reader}, {_memory(way.memory)}: `auto` takes {way.transport or 'nothing'}"]
        lines += [f"  not {reason}" for reason in way.passed_over]
    lines += ["", "whether packets pass between the two machines was not tried"]
    return [_clean(line) for line in lines]


def _transport(row: Row) -> Iterator[str]:
    how = "" if row.auto else ", only if asked for by name"
    moves = ", ".join(row.devices)
    yield f"  {row.transport:<9} {row.runs:<7} {row.part}; moves {moves} memory {_REACH[row.reach]}{how}"
    for missing in row.missing:
        yield f"{'':<20}missing ({missing.kind}): {missing.what}; get it: {missing.remedy}"
    if row.double:
        yield f"{'':<20}double for tests: {row.double}"
    for note in row.notes:
        yield f"{'':<20}note: {note}"


def _engine(engine: Engine) -> Iterator[str]:
    tested = f"tested with {', '.join(engine.tested)}"
    if engine.version is None:
        yield f"  {engine.engine:<9} not installed; {tested}"
        return
    answer = "yes" if engine.works else "no"
    yield f"  {engine.engine:<9} {answer:<7} {engine.version} is installed; {tested}"
    for missing in engine.missing:
        yield f"{'':<20}missing: {missing}"
    if engine.double:
        yield f"{'':<20}double for tests: {engine.double}"


def _choice(choice: AutoChoice) -> Iterator[str]:
    here, elsewhere = choice.here or "nothing", choice.elsewhere or "nothing"
    yield f"`auto` for {_memory(choice.memory)}: {here} within this machine, {elsewhere} to other machines"
    for verdict in choice.verdicts:
        yield f"  {verdict.transport:<9} {'taken' if verdict.taken else 'left out'}: {verdict.reason}"


def _pairing(pairing: Pairing) -> str:
    answer = "yes" if pairing.works else "no"
    return f"{answer}: {pairing.reason}" if pairing.reason else answer


def _memory(kind: str) -> str:
    return _MEMORY.get(kind, f"{kind} memory")


def _facts(machine: Machine) -> list[tuple[str, str]]:
    gpus = {"NVIDIA": machine.nvidia_gpus, "AMD": machine.amd_gpus, "Ascend": machine.ascend_npus}
    yama = _YAMA.get(machine.yama_scope, f"{machine.yama_scope}")
    return [
        ("host", f"{machine.host}, Linux {machine.kernel}, uid {machine.uid}"),
        ("versions", f"kvroom {machine.kvroom}, Python {machine.python}"),
        ("cores", str(machine.cores)),
        ("RDMA devices", ", ".join(machine.rdma_devices) or "none"),
        ("GPUs", ", ".join(f"{count} {maker}" for maker, count in gpus.items() if count) or "none"),
        ("Yama scope", yama),
        ("locked memory", _memlock(machine.memlock_bytes)),
        ("huge pages", f"transparent: {machine.transparent_huge_pages or 'not in this kernel'}; "
                       f"reserved: {machine.huge_pages or 'none'}"),
        ("/dev/shm", _shm(machine)),
    ]  # fmt: skip


def _memlock(limit_bytes: int | None) -> str:
    if limit_bytes is None:
        return "no limit"
    advice = "; RDMA locks all that it registers: raise it with `ulimit -l` or LimitMEMLOCK"
    return f"{_size(limit_bytes)} at most{advice if limit_bytes < _LITTLE_MEMLOCK_BYTES else ''}"


def _shm(machine: Machine) -> str:
    if machine.shm_bytes is None or machine.shm_free_bytes is None:
        return "not mounted"
    return f"{_size(machine.shm_bytes)}, {_size(machine.shm_free_bytes)} of it free"


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


def _columns(pairs: Sequence[tuple[str, str]], width: int = 0) -> list[str]:
    width = max(width, *(len(name) for name, _ in pairs))
    return [f"  {name:<{width}}  {value}" for name, value in pairs]


def _clean(line: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in line)

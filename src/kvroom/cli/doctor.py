"""`kvroom doctor`: which transports can run here or between two machines, which `auto` would choose, what is missing.

The command changes nothing on the machine and needs none of the optional packages, because it is often the first one
that a user runs. The only process that it starts imports SGLang, where SGLang is installed. A report may come from
another machine, so control characters in it are replaced before it is printed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec

from kvroom import load_machine
from kvroom.doctor import FORMAT, Between, Machine, MachineReport, between, examine
from kvroom.errors import ConfigurationError
from kvroom.http import http_session
from kvroom.network import MACHINE_ID_VARIABLE, load_admin_token, load_api_keys, parse_address, read_url

from .admin import ANSWER_WITHIN_S, AdminClient, Unanswered
from .engines import Engine, sglang
from .options import DoctorOptions

_SHOWN_CHARS = 200
_MEMORY = {"cpu": "host memory", "cuda": "GPU memory (cuda)", "npu": "NPU memory (npu)"}
_REACH = {"process": "within one process", "machine": "within one machine", "network": "to any machine"}
_YAMA: dict[int | None, str] = {
    None: "not in this kernel",
    0: "0: no restriction",
    1: "1: kvroom permits writes by processes of its user, which `local` needs",
    2: "2: `local` (vm) needs CAP_SYS_PTRACE; shared pools work without",
    3: "3: `local` (vm) is not permitted; shared pools work",
}
_LOW_MEMLOCK_BYTES = 1 << 30
_WIDTH = 13  # columns for the names in the section `this machine`


class Document(MachineReport, frozen=True, kw_only=True):
    """Output of `kvroom doctor --json`: the report of a machine, and the engines that are installed beside kvroom."""

    engines: tuple[Engine, ...]
    """The engines that have an adapter here, installed or not."""
    identified: bool
    """True if peers can tell this machine from all others, and can therefore detect that it has rebooted."""


class _Header(msgspec.Struct, frozen=True):
    format: int


def run_doctor(options: DoctorOptions) -> int:
    """Print the report. Return 0 if `auto` can choose a transport (with `--between`: in both directions), else 1."""
    if options.between is None:
        report = examine(options.trusted_fabric)
        identified = bool(load_machine(os.environ))
        document = Document(**msgspec.structs.asdict(report), engines=(sglang(),), identified=identified)
        lines = [*report_lines(report), identity_line(identified), *engine_lines(document.engines)]
        _print(document, lines, as_json=options.json)
        return 0 if any(choice.here for choice in report.choices) else 1
    first, second = options.between
    found = between((first, second), (_obtain(first), _obtain(second)), options.trusted_fabric)
    _print(found, between_lines(found), as_json=options.json)
    return 0 if all(way.transport for way in found.ways if way.memory == "cpu") else 1


def _print(found: msgspec.Struct, lines: list[str], *, as_json: bool) -> None:
    print(msgspec.json.encode(found).decode() if as_json else "\n".join(lines))


def _obtain(source: str) -> MachineReport:
    """Return the report in a file or that of a worker. Raises `ConfigurationError` if `source` is neither."""
    if "://" in source:
        return _of_worker(source)
    try:
        return read_report(source, Path(source).read_bytes())
    except FileNotFoundError:
        try:
            parse_address(source)
        except ConfigurationError:
            raise _unreadable(source, "there is no such file") from None
        return _of_worker(source)
    except OSError as error:
        raise _unreadable(source, str(error.strerror)) from None


def _of_worker(source: str) -> MachineReport:
    try:
        url = read_url(source)
    except ConfigurationError as error:
        raise ConfigurationError(f"--between {error}") from None

    async def ask() -> bytes:
        token, keys = load_admin_token(os.environ), load_api_keys(os.environ)
        try:
            async with http_session(aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
                client = AdminClient(session, token, keys)
                workers = await client.workers(url)
                if list(workers) != [url]:
                    raise ConfigurationError(
                        f"--between {url} is a router: give the URL of one of its workers ({', '.join(workers)})"
                    )
                status, body, _ = await client.get(await client.admin_address(url), "/doctor")
        except Unanswered as error:
            raise ConfigurationError(f"--between {url}: {error}") from None
        if status != 200:
            shown = body[:_SHOWN_CHARS].decode(errors="replace")
            raise ConfigurationError(
                f"--between {url} answered {status}: {shown!r}; is it a kvroom worker that supports /doctor?"
            )
        return body

    return read_report(source, asyncio.run(ask()))


def _unreadable(source: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"--between {source!r} cannot be read: {why}; give a file with the output of `kvroom doctor --json`, or the "
        "URL of a worker, as in http://127.0.0.1:8000"
    )


def read_report(source: str, body: bytes) -> MachineReport:
    """Decode the output of `kvroom doctor --json` or of a worker's `/doctor`.

    Raises `ConfigurationError`, which names `source`, for any other text and for the format of another version.
    """
    try:
        found = msgspec.json.decode(body, type=_Header).format
        if found == FORMAT:
            return msgspec.json.decode(body, type=MachineReport)
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"--between {source} is not the output of `kvroom doctor --json`: {error}; save it again on that machine"
        ) from None
    raise ConfigurationError(
        f"--between {source} has document format {found}, but this version of kvroom reads format {FORMAT}; "
        "run `kvroom doctor --json` of the same version on both machines"
    )


def report_lines(report: MachineReport) -> list[str]:
    """Return the text of one machine's report: its transports, the choice of `auto`, and the machine's hardware."""
    lines = ["transports, in the order in which `auto` prefers them:"]
    for row in report.transports:
        how = "" if row.auto else ", only if selected by name"
        moves = f"{', '.join(row.devices)} memory {_REACH[row.reach]}"
        lines.append(f"  {row.transport:<9} {row.runs:<7} {row.part}; moves {moves}{how}")
        lines += [f"{'':<20}missing ({one.kind}): {one.what}; get it: {one.remedy}" for one in row.missing]
        lines += [f"{'':<20}double for tests: {row.double}"] if row.double else []
        lines += [f"{'':<20}note: {note}" for note in row.notes]
    for choice in report.choices:
        here, elsewhere = choice.here or "nothing", choice.elsewhere or "nothing"
        lines += ["", f"`auto` for {_memory(choice.memory)}: {here} within this machine, {elsewhere} to other machines"]
        for verdict in choice.verdicts:
            taken = "chosen" if verdict.taken else "not chosen"
            lines.append(f"  {verdict.transport:<9} {taken}: {verdict.reason}")
    lines += ["", "this machine:", *_columns(_facts(report.machine), _WIDTH)]
    return [_clean(line) for line in lines]


def identity_line(identified: bool) -> str:
    """Return the line that shows if peers can identify this machine.

    If they can, a reboot of the machine proves to them that its processes have ended.
    """
    unknown = f"not known to peers, so a reboot proves nothing to them: set {MACHINE_ID_VARIABLE}"
    return _columns([("identity", "known to peers" if identified else unknown)], _WIDTH)[0]


def engine_lines(engines: Sequence[Engine]) -> list[str]:
    """Return the lines about engines beside kvroom: the installed version, and if the engine can select kvroom."""
    lines = ["", "engines beside kvroom:"]
    for engine in engines:
        tested = f"tested with {', '.join(engine.tested)}"
        if engine.version is None:
            lines.append(f"  {engine.engine:<9} not installed; {tested}")
            continue
        answer = "yes" if engine.works else "no"
        lines.append(f"  {engine.engine:<9} {answer:<7} {engine.version} is installed; {tested}")
        lines += [f"{'':<20}missing: {missing}" for missing in engine.missing]
        lines += [f"{'':<20}double for tests: {engine.double}"] if engine.double else []
    return [_clean(line) for line in lines]


def between_lines(found: Between) -> list[str]:
    """Return the text about two machines: the transports that work between them, and the choice of `auto` each way."""
    first, second = found.names
    lines = [f"{first} ({found.machines[0]}) and {second} ({found.machines[1]}): {found.together}"]
    lines += ["", "transports that can carry blocks between them:"]
    answers = [("yes" if one.works else "no", one) for one in found.pairings]
    lines += _columns([(one.transport, f"{is_so}: {one.reason}" if one.reason else is_so) for is_so, one in answers])
    for way in found.ways:
        lines += ["", f"{way.writer} -> {way.reader}, {_memory(way.memory)}: `auto` takes {way.transport or 'nothing'}"]
        lines += [f"  not {reason}" for reason in way.passed_over]
    lines += ["", "not tested: that packets pass between the two machines"]
    return [_clean(line) for line in lines]


def _memory(kind: str) -> str:
    return _MEMORY.get(kind, f"{kind} memory")


def _facts(machine: Machine) -> list[tuple[str, str]]:
    gpus = {"NVIDIA": machine.nvidia_gpus, "AMD": machine.amd_gpus, "Ascend": machine.ascend_npus}
    yama = _YAMA.get(machine.yama_scope, f"{machine.yama_scope}")
    memlock = "no limit"
    if machine.memlock_bytes is not None:
        memlock = f"at most {_size(machine.memlock_bytes)}"
        if machine.memlock_bytes < _LOW_MEMLOCK_BYTES:
            memlock += "; RDMA locks all registered memory: raise the limit with `ulimit -l` or LimitMEMLOCK"
    shm = "not mounted"
    if machine.shm_bytes is not None and machine.shm_free_bytes is not None:
        shm = f"{_size(machine.shm_bytes)}, {_size(machine.shm_free_bytes)} of it free"
    return [
        ("host", f"{machine.host}, Linux {machine.kernel}, uid {machine.uid}"),
        ("versions", f"kvroom {machine.kvroom}, Python {machine.python}"),
        ("cores", str(machine.cores)),
        ("RDMA devices", ", ".join(machine.rdma_devices) or "none"),
        ("GPUs", ", ".join(f"{count} {maker}" for maker, count in gpus.items() if count) or "none"),
        ("Yama scope", yama),
        ("locked memory", memlock),
        ("huge pages", f"transparent: {machine.transparent_huge_pages or 'not in this kernel'}; "
                       f"reserved: {machine.huge_pages or 'none'}"),
        ("/dev/shm", shm),
    ]  # fmt: skip


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


def _columns(pairs: Sequence[tuple[str, str]], width: int = 0) -> list[str]:
    width = max(width, *(len(name) for name, _ in pairs))
    return [f"  {name:<{width}}  {value}" for name, value in pairs]


def _clean(line: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in line)

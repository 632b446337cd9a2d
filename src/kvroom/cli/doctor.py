"""`kvroom doctor`: which transports can run here or between two machines, which `auto` would choose, what is missing.

It changes nothing and needs none of the optional packages: it is what people run first. It starts nothing but, where
SGLang is installed, a process that imports SGLang and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import aiohttp
import msgspec

from kvroom.cli.admin import ANSWER_WITHIN_S, AdminClient, Unanswered
from kvroom.cli.checkuptext import between_lines, engine_lines, identity_line, report_lines
from kvroom.cli.engines import Engine, sglang
from kvroom.dialling.http import http_session
from kvroom.errors import ConfigurationError
from kvroom.runtime.machine_id import load_machine
from kvroom.runtime.secret import load_admin_token, load_api_keys
from kvroom.transports.selection.doctor import FORMAT, MachineReport, between, examine
from kvroom.wire.address import parse_address, read_url

_SHOWN_CHARS = 200


class Document(MachineReport, frozen=True, kw_only=True):
    """Output of `kvroom doctor --json`: the report of a machine, and the engines that are installed beside kvroom.

    `identified`: peers can tell this machine from all others, and so know when it has booted again.
    """

    engines: tuple[Engine, ...]
    identified: bool


class _Header(msgspec.Struct, frozen=True):
    format: int


def run_doctor(options: argparse.Namespace) -> int:
    """0: some transport can be chosen (with `--between`: in both directions). 1: none can."""
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
    sys.stdout.flush()


def _obtain(source: str) -> MachineReport:
    """The report in a file, or that of a worker. Raises `ConfigurationError` for what is neither."""
    if "://" in source:
        return _of_worker(source)
    try:
        return read_report(source, Path(source).read_bytes())
    except FileNotFoundError:
        if _is_address(source):
            return _of_worker(source)
        raise _unreadable(source, "there is no such file") from None
    except OSError as error:
        raise _unreadable(source, str(error.strerror)) from None


def _is_address(source: str) -> bool:
    try:
        parse_address(source)
    except ConfigurationError:
        return False
    return True


def _of_worker(source: str) -> MachineReport:
    try:
        url = read_url(source)
    except ConfigurationError as error:
        raise ConfigurationError(f"--between {error}") from None
    return read_report(source, asyncio.run(_ask(url)))


def _unreadable(source: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"--between {source!r} cannot be read: {why}; give a file that `kvroom doctor --json` has written, or the URL "
        "of a worker, as in http://127.0.0.1:8000"
    )


async def _ask(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)
    token, keys = load_admin_token(os.environ), load_api_keys(os.environ)
    try:
        async with http_session(timeout) as session:
            client = AdminClient(session, token, keys)
            workers = await client.workers(url)
            if list(workers) != [url]:
                raise ConfigurationError(
                    f"--between {url} is a router: give the URL of one of its workers ({', '.join(workers)})"
                )
            status, body, _ = await client.ask(await client.window(url), "/doctor")
    except Unanswered as error:
        raise ConfigurationError(f"--between {url}: {error}") from None
    if status != 200:
        said = body[:_SHOWN_CHARS].decode(errors="replace")
        raise ConfigurationError(
            f"--between {url} answered {status}: {said!r}; is it a kvroom worker that knows /doctor?"
        )
    return body


def read_report(source: str, body: bytes) -> MachineReport:
    """What `kvroom doctor --json` or a worker's `/doctor` said. `source` is named if it cannot be read."""
    try:
        found = msgspec.json.decode(body, type=_Header).format
        if found == FORMAT:
            return msgspec.json.decode(body, type=MachineReport)
    except msgspec.DecodeError as error:
        raise ConfigurationError(
            f"--between {source} is not what `kvroom doctor --json` prints: {error}; save it anew on that machine"
        ) from None
    raise ConfigurationError(
        f"--between {source} has format {found} of the document, this kvroom reads {FORMAT}; "
        "run `kvroom doctor --json` of the same version on both machines"
    )

"""What any transport must do, as a list of checks: `CHECKS`. Somebody who writes a transport runs them all:

    python -m kvroom.conformance NAME [--option key=value ...] [--only CHECK ...]

NAME is one that `kvroom.transports.create` knows, or "package.module:callable". A check is a function of a
`CheckStage`, from which it takes its ends, each in a process of its own, with memory of known content. It raises
`AssertionError`, or what the transport raised by mistake. Every check compares all memory of the sinks, the
unregistered part included, with what it must hold. The docstring of a check says what it asks; `--list` prints them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvroom.conformance import failures, moves, packing, refusals
from kvroom.conformance.ends import Hosts
from kvroom.conformance.stage import CONNECTS, REOPENS, CheckStage, Skipped
from kvroom.errors import ConfigurationError, KVRoomError
from kvroom.transports import read_option

Check = Callable[[CheckStage], None]

CHECKS: tuple[Check, ...] = (
    *moves.CHECKS,
    *packing.CHECKS,
    *refusals.CHECKS,
    *failures.CHECKS,
)


class Case(NamedTuple):
    """A transport and how it is tried: its name and options, and see `CheckStage` for the others."""

    name: str
    options: dict[str, Any] = {}
    one_process: bool = False
    shared: bool = False
    connects: int = CONNECTS
    reopens: int = REOPENS


def run(check: Check, case: Case, hosts: Hosts) -> None:
    """Run one check; raise what it raises, `Skipped` if it cannot be made."""
    where = None if case.one_process else hosts
    limits = {"connects": case.connects, "reopens": case.reopens}
    with CheckStage(case.name, case.options, where, shared=case.shared, **limits) as stage:
        check(stage)


def judge(check: Check, case: Case, hosts: Hosts) -> tuple[str, str]:
    """Run one check; return "ok", "skipped" or "FAILED", and the reason."""
    try:
        run(check, case, hosts)
    except Skipped as reason:
        return "skipped", str(reason)
    except (AssertionError, KVRoomError, OSError, EOFError) as error:
        return "FAILED", f"{type(error).__name__}: {error}"
    return "ok", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: one line for each check; 1 if any failed."""
    parser = argparse.ArgumentParser(
        prog="python -m kvroom.conformance",
        description="Run the conformance checks over one transport, every end in a process of its own.",
    )
    add, names = parser.add_argument, [check.__name__ for check in CHECKS]
    add("name", metavar="NAME", help='the transport: a registered name or "package.module:callable"')
    repeated = "may be repeated"
    text = f"one option of the transport, the value as JSON or plain text; {repeated}"
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--only", action="append", choices=names, metavar="CHECK", help=f"run this check; {repeated}")
    add("--list", action="store_true", help="print what each check asks, and run none")
    add("--shared", action="store_true", help="memory that other processes can map")
    text = "all ends in this process, for a transport that cannot leave it"
    add("--one-process", action="store_true", help=text)
    text = "how often the checks for growth connect (default: %(default)s)"
    add("--connects", type=int, default=CONNECTS, metavar="N", help=text)
    text = "how often they open and close whole transports (default: %(default)s)"
    add("--reopens", type=int, default=REOPENS, metavar="N", help=text)
    asked = parser.parse_args(arguments)
    chosen = [check for check in CHECKS if not asked.only or check.__name__ in asked.only]
    if asked.list:
        for check in chosen:
            print(f"{check.__name__}: {' '.join((check.__doc__ or '').split())}")
        return 0
    try:
        options = dict(map(read_option, asked.option))
    except ConfigurationError as error:
        parser.error(f"--option: {error}")
    case = Case(
        name=asked.name,
        options=options,
        one_process=asked.one_process,
        shared=asked.shared,
        connects=asked.connects,
        reopens=asked.reopens,
    )
    failed, begin_s, hosts = 0, time.monotonic(), Hosts()
    try:
        for check in chosen:
            start_s = time.monotonic()
            verdict, reason = judge(check, case, hosts)
            failed += verdict == "FAILED"
            took = f"{time.monotonic() - start_s:6.2f} s"
            print(f"{verdict:8}{took}  {check.__name__}{': ' if reason else ''}{reason}", flush=True)
    finally:
        hosts.close()
    print(f"{asked.name}: {len(chosen)} checks, {failed} failed, {time.monotonic() - begin_s:.1f} s")
    return 1 if failed else 0

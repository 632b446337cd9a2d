"""The checks that every transport must pass: `CHECKS`. An author of a transport runs all of them:

    python -m kvroom.conformance NAME [--option key=value ...] [--only CHECK ...]

NAME is a name that `kvroom.transports.create` accepts, or "package.module:callable". A check is a function of a
`CheckStage`, which provides its ends, each in a process of its own, with memory of known content. A check raises
`AssertionError` if the transport behaves wrongly; an error that the transport should not have raised passes through.
Every check compares all memory of the sinks, unregistered memory included, with its expected content. The docstring of
a check states the requirement; `--list` prints them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvroom.errors import ConfigurationError, KVRoomError
from kvroom.transports import read_option

from . import failures, moves, packing, refusals
from .ends import Hosts
from .stage import CONNECTS, REOPENS, CheckStage, Skipped

Check = Callable[[CheckStage], None]

CHECKS: tuple[Check, ...] = (
    *moves.CHECKS,
    *packing.CHECKS,
    *refusals.CHECKS,
    *failures.CHECKS,
)


class Case(NamedTuple):
    """A transport under test, and the conditions under which the checks run."""

    name: str
    """A registered name, or "package.module:callable"."""
    options: dict[str, Any] = {}
    """Options of the transport, by name."""
    one_process: bool = False
    """True: all ends run in this process, for a transport that cannot leave it."""
    shared: bool = False
    """True: the pools are memory that other processes can map."""
    connects: int = CONNECTS
    """Number of rounds in the check that connects and fences without growth."""
    reopens: int = REOPENS
    """Number of rounds in the check that opens and closes whole transports without growth."""


def run(check: Check, case: Case, hosts: Hosts) -> None:
    """Run one check and end its ends. After a failure, the processes that took part are killed.

    Args:
        check: One of `CHECKS`.
        case: The transport under test.
        hosts: Processes for the ends; unused if `case.one_process`.

    Raises:
        Skipped: The check does not apply to this transport.
        AssertionError: The transport behaved wrongly.
        KVRoomError: The transport raised an error that the check does not expect.
        OSError: A process of an end could not be reached; `TimeoutError` if a call took longer than 90 s.
        EOFError: A process of an end has ended.
    """
    where = None if case.one_process else hosts
    limits = {"connects": case.connects, "reopens": case.reopens}
    with CheckStage(case.name, case.options, where, shared=case.shared, **limits) as stage:
        check(stage)


def judge(check: Check, case: Case, hosts: Hosts) -> tuple[str, str]:
    """Run one check as `run` does, and turn its errors into a verdict.

    Args:
        check: One of `CHECKS`.
        case: The transport under test.
        hosts: Processes for the ends; unused if `case.one_process`.

    Returns:
        "ok", "skipped" or "FAILED", and the reason; "" for "ok".
    """
    try:
        run(check, case, hosts)
    except Skipped as reason:
        return "skipped", str(reason)
    except (AssertionError, KVRoomError, OSError, EOFError) as error:
        return "FAILED", f"{type(error).__name__}: {error}"
    return "ok", ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `python -m kvroom.conformance`; print one line for each check.

    Args:
        arguments: The command line without the program's name; None: that of this process.

    Returns:
        The exit status: 1 if a check failed, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvroom.conformance",
        description="Run the conformance checks over one transport, every end in a process of its own.",
    )
    add, names = parser.add_argument, [check.__name__ for check in CHECKS]
    add("name", metavar="NAME", help='the transport: a registered name or "package.module:callable"')
    repeated = "may be repeated"
    text = f"an option of the transport, its value as JSON or plain text; {repeated}"
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--only", action="append", choices=names, metavar="CHECK", help=f"run this check; {repeated}")
    add("--list", action="store_true", help="print the requirement of each check and run none")
    add("--shared", action="store_true", help="use memory that other processes can map")
    text = "run all ends in this process, for a transport that cannot leave it"
    add("--one-process", action="store_true", help=text)
    text = "rounds of the check for growth that connects (default: %(default)s)"
    add("--connects", type=int, default=CONNECTS, metavar="N", help=text)
    text = "rounds of the check for growth that reopens whole transports (default: %(default)s)"
    add("--reopens", type=int, default=REOPENS, metavar="N", help=text)
    given = parser.parse_args(arguments)
    chosen = [check for check in CHECKS if not given.only or check.__name__ in given.only]
    if given.list:
        for check in chosen:
            print(f"{check.__name__}: {' '.join((check.__doc__ or '').split())}")
        return 0
    try:
        options = dict(map(read_option, given.option))
    except ConfigurationError as error:
        parser.error(f"--option: {error}")
    case = Case(
        name=given.name,
        options=options,
        one_process=given.one_process,
        shared=given.shared,
        connects=given.connects,
        reopens=given.reopens,
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
    print(f"{given.name}: {len(chosen)} checks, {failed} failed, {time.monotonic() - begin_s:.1f} s")
    return 1 if failed else 0

"""`kvroom rooms`: show workers and their open rooms, once or repeatedly, or the timeline of one room.

The command reads from the workers' admin addresses (see `kvroom.cli.admin`) and changes nothing there. A worker that
does not answer is reported as one line on stderr and makes the exit status 3; the others are still shown. With
`--watch` the counts are those since the last refresh, and the rooms that ended last stand below the open ones: a
hand-off takes less than a millisecond, so the table of open rooms is often empty under load.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from kvroom import RoomView
from kvroom.errors import ConfigurationError
from kvroom.http import Query, http_session
from kvroom.network import load_admin_token, load_api_keys

from .activity import Activity, OpenRooms, Sample, Stats, activity, newest
from .admin import ANSWER_WITHIN_S, AdminClient, Answer, ListedWorker, Unanswered
from .console import OutputConsole
from .exit_status import ExitStatus
from .interrupts import run_until_interrupted
from .options import RoomsOptions
from .rooms_tables import details, ended_table, escaped, rooms_table, title, workers_table

PAPER_COLUMNS = 180
"""The minimum width of a table that goes to a file or a pipe."""
MAX_ENDED = 10
"""Rows of ended rooms with `--watch`."""

_MIN_ENDED = 3
_FIXED_LINES = 8
"""Lines on the screen of `--watch` that are neither a worker nor a room: titles, heads, the foot, empty lines."""
_SHOWN_CHARS = 200
FoundT = TypeVar("FoundT")


class Found(msgspec.Struct, frozen=True):
    """The response of `/rooms/{id}`."""

    views: tuple[RoomView, ...]


@dataclass(frozen=True)
class Asked(Generic[FoundT]):
    """A worker's answer, or an error message if it gave none."""

    url: str
    answer: FoundT | None
    error: str | None
    role: str = ""
    """`prefill` or `decode`, if the worker or its router has named it."""
    stats: Stats = field(default_factory=Stats)
    """The rooms that ended last, if they were asked for and the worker keeps them."""
    at_s: float = 0.0
    """The time of the answer on the event loop's clock."""

    @property
    def name(self) -> str:
        """Return the role and the address, or only the address if the role is not known."""
        return f"{self.role} {urlsplit(self.url).netloc}".strip()


class _Refusal(msgspec.Struct, frozen=True):
    param: str | None = None


class _Refused(msgspec.Struct, frozen=True):
    error: _Refusal


def run_rooms(options: RoomsOptions) -> int:
    """Show the rooms and return the exit status.

    The status is `NO_ANSWER` if a worker did not answer, and `FAILED` if all answered and the room is open on none of
    them. Ctrl-C ends `--watch` with `DONE`.
    """
    if not options.urls:
        raise ConfigurationError(
            "no worker is named: give a URL, as in `kvroom rooms http://127.0.0.1:8000` (a worker prints its URL when "
            "it is ready)"
        )
    if options.watch and (options.json or options.room is not None):
        raise ConfigurationError("--watch cannot be combined with --json or --room: leave out one of them")
    token, keys = load_admin_token(os.environ), load_api_keys(os.environ)
    console = OutputConsole()
    if not console.is_terminal:
        console.width = max(console.width, PAPER_COLUMNS)

    async def show() -> int:
        async with http_session(aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
            client = AdminClient(session, token, keys)
            if options.room is not None:
                return await _show_one(client, options, options.room, console)
            if options.watch:
                await _watch(client, options, console)
            asked = await _ask_all(client, options.urls, "/rooms", OpenRooms, query={"oldest": options.limit})
            if options.json:
                _print_json(asked)
            else:
                console.print(_overview(asked, {}, options.limit))
            return _print_errors(asked)

    status = run_until_interrupted(show())
    if status is None:
        return ExitStatus.DONE if options.watch else ExitStatus.INTERRUPTED
    return status


async def _watch(client: AdminClient, options: RoomsOptions, console: OutputConsole) -> None:
    """Refresh until cancelled: in place on a terminal, elsewhere as one block of lines after the other."""
    if console.is_terminal:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            await _refresh(client, options, console, live)
    else:
        await _refresh(client, options, console, None)


async def _refresh(client: AdminClient, options: RoomsOptions, console: OutputConsole, live: Live | None) -> None:
    before: dict[str, Sample] = {}
    while True:
        query = {"oldest": options.limit}
        asked = await _ask_all(client, options.urls, "/rooms", OpenRooms, query=query, with_stats=True)
        height = console.height if live else 0
        shown = _activity_view(asked, before, options.limit, height)
        if live:
            live.update(shown, refresh=True)
        else:
            console.print(shown, end="\n\n")  # rich flushes the output after each print
        before |= {one.url: Sample(one.at_s, one.answer.counts) for one in asked if one.answer and one.answer.counts}
        await asyncio.sleep(options.every_s)


def _activity_view(
    asked: Sequence[Asked[OpenRooms]], before: Mapping[str, Sample], limit: int, height: int
) -> RenderableType:
    """Return one refresh. A screen of `height` lines gets only the rows that fit; 0 stands for no screen."""
    ended = MAX_ENDED
    if height:
        left = height - _FIXED_LINES - len(asked)
        ended = min(MAX_ENDED, max(_MIN_ENDED, left // 2))
        limit = min(limit, max(1, left - ended))
    errors = [escaped(f"{one.name}: {one.error}") for one in asked if one.error]
    rows = newest(((one.name, one.stats.recent) for one in asked), ended)
    return Group(_overview(asked, before, limit, errors), Text(), ended_table(rows))


async def _show_one(client: AdminClient, options: RoomsOptions, room: int, console: OutputConsole) -> int:
    asked = await _ask_all(client, options.urls, f"/rooms/{room}", Found)
    found = [(one.url, view) for one in asked if one.answer for view in one.answer.views]
    if options.json:
        _print_json(asked)
    for url, view in () if options.json else found:
        console.print(details(url, view))
    status = _print_errors(asked)
    if found or status:
        return status
    where = ", ".join(one.url for one in asked)
    print(
        f"kvroom rooms: room {room} is not open on {where}: it is not open yet, or it has ended; --watch shows "
        "the rooms that ended last, and the workers' logs say why a room failed",
        file=sys.stderr,
    )
    return ExitStatus.FAILED


def _overview(
    asked: Sequence[Asked[OpenRooms]], before: Mapping[str, Sample], limit: int, errors: Sequence[Text] = ()
) -> RenderableType:
    """Return the title, the table of workers, the errors, and the open rooms."""
    # Prefill workers come first. A router lists its workers in no fixed order, and the rows must not jump.
    ordered = sorted(asked, key=lambda one: (one.role != "prefill", one.name))
    answered = [(one, one.answer) for one in ordered if one.answer]
    rows = [activity(one.name, answer, one.at_s, before.get(one.url)) for one, answer in answered]
    head = title(datetime.now(), len(answered), _shortest(rows))
    if not answered:
        return Group(head, *errors)
    views = [(one.name, view) for one, answer in answered for view in answer.open]
    total = sum(answer.number for _, answer in answered)
    return Group(head, workers_table(rows), *errors, Text(), rooms_table(views, total=total, limit=limit))


def _shortest(rows: Sequence[Activity]) -> float | None:
    """Return the interval of the counts: that of any worker that was there at the last refresh."""
    return min((row.interval_s for row in rows if row.interval_s is not None), default=None)


def _print_json(asked: Sequence[Asked[FoundT]]) -> None:
    workers = [
        {"url": one.url, "role": one.role, "error": one.error, "answer": msgspec.to_builtins(one.answer)}
        for one in asked
    ]
    print(msgspec.json.encode({"workers": workers}).decode())


def _print_errors(asked: Sequence[Asked[FoundT]]) -> int:
    errors = [one for one in asked if one.error is not None]
    for one in errors:
        role = f"{one.role} worker " if one.role else ""
        print(f"kvroom rooms: {role}{one.url}: {one.error}", file=sys.stderr)
    return ExitStatus.NO_ANSWER if errors else ExitStatus.DONE


async def _ask_all(
    client: AdminClient,
    urls: Sequence[str],
    path: str,
    expected: type[FoundT],
    *,
    query: Query | None = None,
    with_stats: bool = False,
) -> list[Asked[FoundT]]:
    """Query every named worker and every worker of a named router, each of them once."""

    async def ask_named(url: str) -> list[Asked[FoundT]]:
        try:
            workers = await client.listed(url)
        except Unanswered as error:
            return [Asked(url, None, str(error))]
        if workers is None:
            return [await ask(ListedWorker(url))]
        if not workers:
            return [Asked(url, None, "this router has no workers: start workers, then the router with their URLs")]
        return await asyncio.gather(*map(ask, workers))

    async def ask(worker: ListedWorker) -> Asked[FoundT]:
        role = worker.worker_type if worker.worker_type in ("prefill", "decode") else ""
        try:
            where = await client.admin_address(worker.url)
            role = where.role or role
            answer = _read(await client.get(where, path, query), expected)
            at_s = asyncio.get_running_loop().time()
            stats = _read_stats(await client.get(where, "/stats")) if with_stats else Stats()
        except Unanswered as error:
            return Asked(worker.url, None, str(error), error.role or role)
        return Asked(worker.url, answer, None, role, stats, at_s)

    asked = await asyncio.gather(*map(ask_named, urls))
    return list({one.url: one for one in chain.from_iterable(asked)}.values())


def _read_stats(answer: Answer) -> Stats:
    """Return the rooms that ended last; none for a server without `/stats`, such as a `StatusServer`."""
    if answer.status == 200:
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(answer.body, type=Stats)
    return Stats()


def _read(answer: Answer, expected: type[FoundT]) -> FoundT | None:
    """Return a worker's answer. None: a 404 of its own, the room is not open there."""
    said = answer.body[:_SHOWN_CHARS].decode(errors="replace")
    if answer.status == 404 and expected is Found:
        with suppress(msgspec.DecodeError):  # it may be that of a server that has no such route
            if msgspec.json.decode(answer.body, type=_Refused).error.param == "room":
                return None
    if answer.status != 200:
        raise Unanswered(f"answered {answer.status}: {said!r}; is it a kvroom worker or its router?")
    try:
        return msgspec.json.decode(answer.body, type=expected)
    except msgspec.DecodeError as error:
        raise Unanswered(f"what it says about its rooms cannot be read ({error}): {said!r}") from None

"""`kvroom rooms`: show the open rooms of workers as a table, once or repeatedly, or the timeline of one room.

The command reads from the workers' admin addresses (see `kvroom.cli.admin`) and changes nothing there. A worker that
does not answer is reported as one line on stderr and makes the exit status 1; the rooms of the others are still shown.
Text from peers is escaped, so that it cannot reach the terminal as markup or as control codes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvroom import Phase, RoomView
from kvroom.errors import ConfigurationError
from kvroom.http import Query, http_session
from kvroom.network import load_admin_token, load_api_keys

from .admin import ANSWER_WITHIN_S, AdminClient, Answer, Unanswered
from .console import OutputConsole
from .interrupts import run_until_interrupted
from .options import RoomsOptions

PAPER_COLUMNS = 180
"""The minimum width of a table that goes to a file or a pipe."""

_SHOWN_CHARS = 200
_COLUMNS = ("worker", "room", "side", "phase", "for", "waits for", "deadline in", "peers", "pages", "bytes")
_NUMBERS = frozenset({"room", "for", "deadline in", "pages", "bytes"})
FoundT = TypeVar("FoundT")


class OpenRooms(msgspec.Struct, frozen=True):
    """The part of a `/rooms` response that this command shows."""

    open: tuple[RoomView, ...]
    """The oldest open rooms."""
    kept: int | None = None
    """The number of all open rooms; None if `open` has all of them."""


class Found(msgspec.Struct, frozen=True):
    """The response of `/rooms/{id}`."""

    views: tuple[RoomView, ...]


@dataclass(frozen=True)
class Asked(Generic[FoundT]):
    """A worker's answer, or an error message if it gave none."""

    url: str
    answer: FoundT | None
    error: str | None


class _Refusal(msgspec.Struct, frozen=True):
    param: str | None = None


class _Refused(msgspec.Struct, frozen=True):
    error: _Refusal


def run_rooms(options: RoomsOptions) -> int:
    """Show the rooms and return the exit status.

    The status is 1 if a worker did not answer, or if the room is open on none of the workers. Ctrl-C ends `--watch`
    with status 0.
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
            if options.watch and console.is_terminal:
                await _watch(client, options, console)
            asked = await _ask_all(client, options.urls, "/rooms", OpenRooms, query={"oldest": options.limit})
            if options.json:
                _print_json(asked)
            else:
                console.print(_all_rooms(asked, options.limit))
            return _print_errors(asked)

    status = run_until_interrupted(show())
    return 0 if status is None else status


async def _watch(client: AdminClient, options: RoomsOptions, console: OutputConsole) -> None:
    """Refresh the table until cancelled. The error of a worker that does not answer stands below the table."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            asked = await _ask_all(client, options.urls, "/rooms", OpenRooms, query={"oldest": options.limit})
            shown: list[RenderableType] = [_all_rooms(asked, options.limit)]
            shown += [f"{one.url}: {one.error}" for one in asked if one.error]
            live.update(Group(*shown), refresh=True)
            await asyncio.sleep(options.every_s)


async def _show_one(client: AdminClient, options: RoomsOptions, room: int, console: OutputConsole) -> int:
    asked = await _ask_all(client, options.urls, f"/rooms/{room}", Found)
    found = [(one.url, view) for one in asked if one.answer for view in one.answer.views]
    if options.json:
        _print_json(asked)
    for url, view in () if options.json else found:
        console.print(details(url, view))
    status = _print_errors(asked)
    if not found and not status:
        where = ", ".join(one.url for one in asked)
        print(
            f"kvroom rooms: room {room} is not open on {where}: it is not open yet, or it has ended; workers keep no "
            "record of ended rooms, so look for the failure in their logs",
            file=sys.stderr,
        )
    return status if found else 1


def _all_rooms(asked: Sequence[Asked[OpenRooms]], limit: int) -> RenderableType:
    views = [(one.url, view) for one in asked if one.answer for view in one.answer.open]
    kept = [(one.answer.kept, len(one.answer.open)) for one in asked if one.answer]
    return table(views, total=sum(here if total is None else total for total, here in kept), limit=limit)


def _print_json(asked: Sequence[Asked[FoundT]]) -> None:
    workers = [{"url": one.url, "error": one.error, "answer": msgspec.to_builtins(one.answer)} for one in asked]
    print(msgspec.json.encode({"workers": workers}).decode())


def _print_errors(asked: Sequence[Asked[FoundT]]) -> int:
    errors = [one for one in asked if one.error is not None]
    for one in errors:
        print(f"kvroom rooms: {one.url}: {one.error}", file=sys.stderr)
    return 1 if errors else 0


async def _ask_all(
    client: AdminClient, urls: Sequence[str], path: str, expected: type[FoundT], *, query: Query | None = None
) -> list[Asked[FoundT]]:
    """Query every named worker and every worker of a named router, each of them once."""

    async def ask_named(url: str) -> list[Asked[FoundT]]:
        try:
            workers = await client.workers(url)
        except Unanswered as error:
            return [Asked(url, None, str(error))]
        return await asyncio.gather(*map(ask, workers))

    async def ask(url: str) -> Asked[FoundT]:
        try:
            answer = await client.get(await client.admin_address(url), path, query)
            return Asked(url, _read(answer, expected), None)
        except Unanswered as error:
            return Asked(url, None, str(error))

    asked = await asyncio.gather(*map(ask_named, urls))
    return list({one.url: one for one in chain.from_iterable(asked)}.values())


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


def table(views: Sequence[tuple[str, RoomView]], *, total: int, limit: int) -> RenderableType:
    """The oldest rooms first, at most `limit`; `total` is how many there are."""
    oldest = sorted(views, key=lambda one: age_s(one[1]), reverse=True)[:limit]
    rows = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        rows.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=name not in ("waits for",))
    for url, view in oldest:
        deadline = "" if view.waits_until_s is None else _seconds(view.waits_until_s)
        held = (", ".join(view.peers), str(view.pages), str(view.nbytes))
        where = (urlsplit(url).netloc, str(view.room), view.side, view.phase, _seconds(in_phase_s(view)))
        rows.add_row(*map(_text, (*where, _waits_for(view), deadline, *held)))
    more = f", the {len(oldest)} oldest are shown" if total > len(oldest) else ""
    return Group(rows, Text(f"{total} {'room' if total == 1 else 'rooms'} open{more}"))


def details(url: str, view: RoomView) -> RenderableType:
    """Return the text about one room: its phase, what it waits for, and the time spent in each phase so far."""
    more = f", {_seconds(view.waits_until_s)} more" if view.waits_for else ""
    lines = [
        f"room {view.room} on {url}, {view.side} side: {view.phase} for {_seconds(in_phase_s(view))}",
        f"  waits for {_waits_for(view)}{more}",
        f"  peers: {', '.join(view.peers) or 'none'}; pages held: {view.pages}; bytes landed: {view.nbytes}"
        f"{'; cleared by its engine' if view.cleared else ''}",
    ]
    if view.identity or view.peer_identity:
        lines.append(f"  identity: {', '.join(_identity(view))}")
    if view.failure:
        lines.append(f"  {view.failure}")
    rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2))
    for name in ("phase", "since (s ago)", "for (s)"):
        rows.add_column(name, justify="left" if name == "phase" else "right")
    ends = [ago for _, ago in view.timeline[1:]] + [0.0]
    for (phase, ago), end in zip(view.timeline, ends, strict=True):
        rows.add_row(_text(phase), f"{ago:.3f}", f"{ago - end:.3f}")
    return Group(*(_text(line) for line in lines), rows)


def age_s(view: RoomView) -> float:
    """Return the seconds since the room was opened."""
    return view.timeline[0][1] if view.timeline else 0.0


def in_phase_s(view: RoomView) -> float:
    """Return the seconds since the room entered its current phase."""
    return view.timeline[-1][1] if view.timeline else 0.0


def _identity(view: RoomView) -> Iterator[str]:
    """Yield each field of the request's identity with its digest and the side or sides that have sent it."""
    for name in sorted(view.identity.keys() | view.peer_identity.keys()):
        here, there = view.identity.get(name), view.peer_identity.get(name)
        if here == there:
            yield f"{name} {here} (both sides)"
        elif here is not None and there is not None:
            yield f"{name} {here} here, {there} on the other side"
        elif here is None:
            yield f"{name} {there} (only the other side)"
        else:
            yield f"{name} {here} ({'only this side' if view.peer_identity else 'the other side has not sent its own'})"


def _waits_for(view: RoomView) -> str:
    if view.phase == Phase.QUARANTINED.name:
        return f"{view.waits_for} (the room ended with {view.cause})"
    return view.waits_for or "its engine to clear it"  # an ended room stays in the table until then


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _text(said: str) -> Text:
    return Text("".join(letter if letter.isprintable() else "?" for letter in said))

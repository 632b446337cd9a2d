"""The two failures of `kvroom demo`, and the table of what each of them left behind.

A scene breaks one request in the middle, at a moment that the decode worker states: its room is in phase RECEIVING, so
some KV pages have arrived and others have not. Then it asks the workers that still run until none of them keeps
anything of the request, and measures how long that took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from kvroom.errors import KVRoomError
from kvroom.http import request

from .admin import AdminAddress, AdminClient
from .cluster import Cluster

CLEAN_WITHIN_S = 20
_BREAK_WITHIN_S = 60
_ATTEMPTS = 3
_DECODE = "decode-0"


class Left(NamedTuple):
    """The state of one worker after an event."""

    event: str
    worker: str
    held_pages: int
    """Pages that the room of the broken request held on this worker just before the event."""
    open_rooms: int
    quarantined_pages: int
    owned_pages: int
    table_entries: int
    """Entries of the room table's indexes: peers, timers and early arrivals."""
    after_ms: float
    """Time from the event until the worker's answer."""

    @property
    def is_clean(self) -> bool:
        return not (self.open_rooms or self.quarantined_pages or self.owned_pages or self.table_entries)


@dataclass(frozen=True)
class Stage:
    """Everything that a scene needs: the cluster, the client session and the admin client of the demo."""

    here: Cluster
    session: aiohttp.ClientSession
    client: AdminClient

    async def break_request(self, body: Mapping[str, Any]) -> tuple[asyncio.Task[str], Mapping[str, int]]:
        """Send `body` and return when its room is half received: the running request, and the pages held by worker.

        A prompt in a single chunk is over at once, and then the next one is tried. Raises `KVRoomError` if no request
        was caught.
        """
        for _ in range(_ATTEMPTS):
            task = asyncio.ensure_future(self._read_all(body))
            waiting = asyncio.ensure_future(self._get(_DECODE, {"phase": "RECEIVING", "within_s": _BREAK_WITHIN_S}))
            is_caught = False
            try:
                await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
                if waiting.done() and not task.done():
                    held = {_DECODE: _pages(await waiting)}
                    for name in self.here.admin_urls.keys() - {_DECODE}:
                        held[name] = _pages(await self._get(name, {}))
                    is_caught = not task.done() and bool(held[_DECODE])
                if is_caught:
                    return task, held
            finally:
                if not is_caught:
                    task.cancel()
                waiting.cancel()
                await asyncio.gather(waiting, *([] if is_caught else [task]), return_exceptions=True)
        raise KVRoomError(
            "no request could be broken: each was handed over before the demo saw it; give --chunk-tokens 64"
        )

    async def _read_all(self, body: Mapping[str, Any]) -> str:
        """Read the whole answer and return a short description of how it ended."""
        async with request(self.session, "POST", self.here.url, "/v1/chat/completions", json=body) as response:
            text = await response.text()
            return f"{response.status}: {text[:200]}"

    async def what_is_left(self, event: str, held: Mapping[str, int], names: Sequence[str], since: float) -> list[Left]:
        """Return the state of each named worker as soon as it is idle, or after `CLEAN_WITHIN_S` seconds."""

        async def one(name: str) -> Left:
            body = await self._get(name, {"idle_within_s": CLEAN_WITHIN_S})
            audit, pages = body["rooms"], body["pool"]
            entries = audit["early_arrivals"] + audit["indexed"] + audit["timers"]
            return Left(
                event, name, held.get(name, 0), len(body["open"]),
                pages["quarantined"], pages["owned"], entries,
                (time.monotonic() - since) * 1e3,
            )  # fmt: skip

        return list(await asyncio.gather(*map(one, names)))

    async def _get(self, name: str, query: Mapping[str, Any]) -> dict[str, Any]:
        url = self.here.admin_urls[name]
        answer = await self.client.get(AdminAddress(url, url, is_trusted=True), "/rooms", dict(query))
        try:
            body: dict[str, Any] = msgspec.json.decode(answer.body, type=dict[str, Any])
        except msgspec.DecodeError:
            body = {}
        if answer.status not in (200, 503) or "open" not in body:
            raise KVRoomError(
                f"{name} answered {answer.status} to /rooms: {answer.body[:200].decode(errors='replace')}"
            )
        return body


def _pages(body: Mapping[str, Any]) -> int:
    return sum(int(room["pages"]) for room in body["open"])


def table_of(left: Sequence[Left]) -> Table:
    """Return the table of what each event left behind on every worker that was running."""
    table = Table(title="what each failure left behind")
    for name in ("event", "worker"):
        table.add_column(name)
    for name in ("pages held before", "open rooms", "quarantined pages", "owned pages", "table entries", "after"):
        table.add_column(name, justify="right")
    for one in left:
        counts = (one.held_pages, one.open_rooms, one.quarantined_pages, one.owned_pages, one.table_entries)
        table.add_row(one.event, one.worker, *map(str, counts), f"{one.after_ms:,.0f} ms")
    return table


async def client_leaves(stage: Stage, body: Mapping[str, Any], console: Console) -> list[Left]:
    """Close the client's connection in the middle of a hand-over. Return what is left on every worker."""
    say(
        console,
        "A client leaves while the KV pages of its prompt are being handed over. The decode worker must not give these "
        "pages to another request while the prefill worker can still write into them, and must not keep them either.",
    )
    task, held = await stage.break_request(body)
    task.cancel()
    since = time.monotonic()
    await asyncio.gather(task, return_exceptions=True)
    say(console, f"  the client closed its connection; pages held: {_named(held)}")
    left = await stage.what_is_left("client left", held, list(stage.here.admin_urls), since)
    tell(console, left)
    return left


async def prefill_dies(stage: Stage, body: Mapping[str, Any], console: Console) -> list[Left]:
    """Kill the prefill worker in the middle of a hand-over and start it again. Return what is left on the decode side.

    The successor is being started when this returns: see `Cluster.start_again`.
    """
    name = next(name for name in stage.here.admin_urls if name != _DECODE)
    children = stage.here.children
    say(
        console,
        f"{name} is killed (SIGKILL) while it writes KV pages into the memory of {_DECODE}. {_DECODE} may use these "
        "pages again only with a proof that the writer is gone: here, that its process has ended.",
    )
    task, held = await children.guard(stage.break_request(body))
    try:
        since = time.monotonic()
        await stage.here.workers[name].child.kill()
        say(console, f"  {name} was killed; pages held: {_named(held)}")
        await stage.here.start_again(name)
        left = await children.guard(stage.what_is_left(f"{name} killed", held, [_DECODE], since))
        (answer,) = await children.guard(asyncio.gather(task, return_exceptions=True))
    finally:
        task.cancel()
    tell(console, left)
    say(console, f"  the client of the broken request got: {answer}")
    return left


def say(console: Console, text: str) -> None:
    """Print a sentence as it stands, without markup."""
    console.print(text, markup=False, highlight=False)


def tell(console: Console, left: Sequence[Left]) -> None:
    """Print for each worker how long after the event nothing was left, or that something is."""
    for one in left:
        state = "nothing left" if one.is_clean else "SOMETHING IS LEFT"
        say(console, f"  {one.worker}: {state} {one.after_ms:,.0f} ms after the event")


def _named(held: Mapping[str, int]) -> str:
    return ", ".join(f"{pages} on {name}" for name, pages in held.items())

"""The two failures of `kvroom demo`, and the table of what each of them left behind.

A scene breaks one request in the middle, at a moment that the decode worker states: its room is in phase RECEIVING, so
some KV pages have arrived and others have not. Then it asks the workers that still run until none of them keeps
anything of the request, and measures how long that took.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.table import Table

from kvroom.errors import KVRoomError
from kvroom.http import request

from .admin import AdminAddress, AdminClient
from .cluster import Cluster
from .console import OutputConsole

CLEAN_WITHIN_S = 20
_BREAK_WITHIN_S = 60
_ATTEMPTS = 3
_POLL_S = 0.005
_DECODE = "decode-0"
_PROOFS = {
    "transport": "its transport saw that the writer's process has ended",
    "machine": "another process of that machine saw that the writer's process has ended",
}
"""Sentences for the values of the label `proof` of `kvroom_peers_fenced`."""


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
    gone_ms: float
    """Time from the event until the broken room was gone on this worker, and with it every page that it held."""
    is_idle: bool
    """True if the worker itself reports that no room and no request is left."""

    @property
    def is_clean(self) -> bool:
        kept = self.open_rooms or self.quarantined_pages or self.owned_pages or self.table_entries
        return self.is_idle and not kept


class Broken(NamedTuple):
    """The room of a request that is being broken."""

    room: int
    """Its number."""
    held: Mapping[str, int]
    """The pages that it held just before, by worker."""


@dataclass(frozen=True)
class Stage:
    """Everything that a scene needs: the cluster, the client session and the admin client of the demo."""

    here: Cluster
    session: aiohttp.ClientSession
    client: AdminClient

    async def break_request(self, body: Mapping[str, Any]) -> tuple[asyncio.Task[str], Broken]:
        """Send `body` and return when its room is half received: the running request and its room.

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
                    (room, *_) = (await waiting)["open"]
                    held = {_DECODE: int(room["pages"])}
                    for name in self.here.admin_urls.keys() - {_DECODE}:
                        held[name] = sum(int(one["pages"]) for one in (await self._get(name, {}))["open"])
                    is_caught = not task.done() and bool(held[_DECODE])
                if is_caught:
                    return task, Broken(int(room["room"]), held)
            finally:
                if not is_caught:
                    task.cancel()
                waiting.cancel()
                await asyncio.gather(waiting, *([] if is_caught else [task]), return_exceptions=True)
        raise KVRoomError(
            "no request could be broken: each was handed over before the demo saw it; give --chunk-tokens 64"
        )

    async def _read_all(self, body: Mapping[str, Any]) -> str:
        """Read the whole answer and return a sentence about the status with which it ended."""
        async with request(self.session, "POST", self.here.url, "/v1/chat/completions", json=body) as response:
            await response.read()
            if response.status == 200:
                return "the router sent the broken request again, and the client got its answer"
            return f"the client got HTTP {response.status} ({response.reason}) and can send its request again"

    async def what_is_left(self, event: str, broken: Broken, names: Sequence[str], since: float) -> list[Left]:
        """Return the state of each named worker: when the broken room was gone, and what is kept once it is idle.

        The router may have sent the request once more, in another room, so a worker may be idle much later than the
        broken room is gone. Each wait ends after `CLEAN_WITHIN_S` seconds.
        """

        async def one(name: str) -> Left:
            while time.monotonic() < since + CLEAN_WITHIN_S:
                answer = await self.client.get(self._admin(name), f"/rooms/{broken.room}")
                if answer.status == 404:
                    break
                await asyncio.sleep(_POLL_S)
            gone_ms = (time.monotonic() - since) * 1e3
            is_idle, body = await self._rooms(name, {"idle_within_s": CLEAN_WITHIN_S})
            audit, pages = body["rooms"], body["pool"]
            return Left(
                event, name, broken.held.get(name, 0), len(body["open"]),
                max(pages["quarantined"], audit["quarantined_pages"]), pages["owned"],
                audit["early_arrivals"] + audit["indexed"] + audit["timers"], gone_ms, is_idle,
            )  # fmt: skip

        return list(await asyncio.gather(*map(one, names)))

    async def fenced(self, name: str) -> Mapping[str, int]:
        """Return the number of lost peers that a worker has proven to write no longer, by the source of the proof."""
        answer = await self.client.get(self._admin(name), "/metrics")
        found = re.findall(r'^kvroom_peers_fenced_total{proof="(\w+)"} (\S+)$', answer.body.decode(), re.MULTILINE)
        return {proof: int(float(count)) for proof, count in found}

    async def _get(self, name: str, query: Mapping[str, Any]) -> dict[str, Any]:
        return (await self._rooms(name, query))[1]

    async def _rooms(self, name: str, query: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Return if a worker answered 200 (and not 503: its state is not as asked for), and what it keeps."""
        answer = await self.client.get(self._admin(name), "/rooms", dict(query))
        try:
            body: dict[str, Any] = msgspec.json.decode(answer.body, type=dict[str, Any])
        except msgspec.DecodeError:
            body = {}
        if answer.status not in (200, 503) or "open" not in body:
            raise KVRoomError(
                f"{name} answered {answer.status} to /rooms: {answer.body[:200].decode(errors='replace')}"
            )
        return answer.status == 200, body

    def _admin(self, name: str) -> AdminAddress:
        url = self.here.admin_urls[name]
        return AdminAddress(url, url, is_trusted=True)


def table_of(left: Sequence[Left]) -> Table:
    """Return the table of what each event left behind on every worker that was running."""
    table = Table(title="what each failure left behind", box=None, padding=(0, 1, 0, 0))
    for name in ("event", "worker"):
        table.add_column(name, no_wrap=True)
    for name in ("pages\nbefore", "rooms\nleft", "pages in\nquarantine", "pages\nowned", "table\nentries"):
        table.add_column(name, justify="right")
    table.add_column("room gone\nafter", justify="right")
    for one in left:
        counts = (one.held_pages, one.open_rooms, one.quarantined_pages, one.owned_pages, one.table_entries)
        table.add_row(one.event, one.worker, *map(str, counts), f"{one.gone_ms:,.0f} ms")
    return table


async def client_leaves(stage: Stage, body: Mapping[str, Any], console: OutputConsole) -> list[Left]:
    """Close the client's connection in the middle of a hand-over. Return what is left on every worker."""
    say(
        console,
        "A client leaves while the KV pages of its prompt are being handed over. The decode worker must not give these "
        "pages to another request while the prefill worker can still write into them, and must not keep them either. "
        "The prefill worker first finishes the chunk that it computes.",
    )
    task, broken = await stage.break_request(body)
    task.cancel()
    since = time.monotonic()
    await asyncio.gather(task, return_exceptions=True)
    say(console, f"  the client closed its connection; pages held: {_named(broken.held)}")
    left = await stage.what_is_left("client left", broken, list(stage.here.admin_urls), since)
    tell(console, left)
    return left


async def prefill_dies(stage: Stage, body: Mapping[str, Any], console: OutputConsole) -> tuple[float, list[Left]]:
    """Kill the prefill worker in the middle of a hand-over and start it again.

    Returns the time of the kill, on the clock of `time.monotonic`, and what is left on the decode side. The successor
    is being started then: see `Cluster.start_again`.
    """
    name = next(name for name in stage.here.admin_urls if name != _DECODE)
    children = stage.here.children
    say(
        console,
        f"{name} is killed (SIGKILL) while it writes KV pages into the memory of {_DECODE}. {_DECODE} may use these "
        "pages again only when it is proven that no process can still write into them.",
    )
    before = await children.guard(stage.fenced(_DECODE))
    task, broken = await children.guard(stage.break_request(body))
    try:
        killed_at = time.monotonic()
        await stage.here.workers[name].child.kill()
        say(console, f"  {name} was killed; pages held: {_named(broken.held)}")
        await stage.here.start_again(name)
        left = await children.guard(stage.what_is_left(f"{name} killed", broken, [_DECODE], killed_at))
        proofs = await children.guard(stage.fenced(_DECODE))
        (answer,) = await children.guard(asyncio.gather(task, return_exceptions=True))
    finally:
        task.cancel()
    tell(console, left)
    used = [_PROOFS.get(proof, proof) for proof, count in proofs.items() if count > before.get(proof, 0)]
    say(console, f"  the proof on {_DECODE}: {' and '.join(used) or 'none was needed, no page waited for one'}")
    told = f"the client of the broken request lost its connection ({type(answer).__name__})"
    say(console, f"  {answer if isinstance(answer, str) else told}")
    return killed_at, left


def say(console: OutputConsole, text: str) -> None:
    """Print a sentence as it stands, without markup."""
    console.print(text, markup=False, highlight=False)


def tell(console: OutputConsole, left: Sequence[Left]) -> None:
    """Print for each worker how long after the event nothing was left, or that something is."""
    for one in left:
        state = f"the room was gone after {one.gone_ms:,.0f} ms, and nothing is left"
        say(console, f"  {one.worker}: {state if one.is_clean else 'SOMETHING IS LEFT: see the table'}")


def _named(held: Mapping[str, int]) -> str:
    return ", ".join(f"{pages} on {name}" for name, pages in held.items())

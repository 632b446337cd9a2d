"""HTTP routes that show a manager's rooms, and one that declares lost peers to be gone.

    GET /rooms                      every room, and an audit that recounts all of them
    GET /rooms?oldest=N             the N rooms that were opened first, the number of all, and counts since the start
    GET /rooms?idle_within_s=N      wait until no room is open
    GET /rooms?phase=P&within_s=N   wait until a room is in phase P
    GET /rooms/{number}             one room, on each side of it that is kept here
    POST /fence                     {"host": H} or {"peer": "H:PORT"}: the processes of the lost peers there have ended

Ages are relative to `now` of the same answer, in seconds of Unix time.

Calls of the manager block until its loop answers, so they run in other threads: the HTTP loop is never held up.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

from kvroom.core.phases import Phase
from kvroom.errors import ConfigurationError
from kvroom.runtime.handles import ROOM_NUMBERS
from kvroom.runtime.manager import KVManager
from kvroom.runtime.measure import Metrics
from kvroom.wire.address import parse_address, read_host
from kvroom.wire.frames import UNDECODABLE

from .answers import BadRequest, Body, error_response, unavailable_headers
from .shared_check import SharedCheck

MAX_WAIT_S = 60.0
MAX_SHOWN = 10_000
_CHECK_EVERY_S = 0.01
_IDLE_SLICE_S = 0.5
"""Longest wait of one check in its thread. The thread outlives a client that has hung up, and a server, by this."""

Extra = Callable[[], Body]
"""Further counts of the manager's owner, shown with its rooms. Called in any thread for each answer; JSON values only.
"""


class RoomsWindow:
    """The routes for the rooms of one manager.

    Args:
        manager: the manager, which the caller closes after the server.
        extra: returns further counts, shown at the top level of each answer of `/rooms`.
        is_idle_within: blocks for up to the given seconds, and returns True as soon as nothing is open. Without it
            `manager.wait_idle`; an owner that keeps more than rooms gives its own.
    """

    def __init__(
        self, manager: KVManager, extra: Extra = dict, is_idle_within: Callable[[float], bool] | None = None
    ) -> None:
        self._manager = manager
        self._extra = extra
        is_idle = is_idle_within or manager.wait_idle
        self._idle = SharedCheck(lambda: is_idle(_IDLE_SLICE_S))
        self._open = SharedCheck(self._open_rooms)

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, for an application with the middleware `errors_as_json`."""
        return [
            web.get("/rooms", self._rooms),
            web.get("/rooms/{number}", self._room),
            web.post("/fence", self._fence),
        ]

    async def _rooms(self, http: web.Request) -> web.StreamResponse:
        """Answer with the open rooms.

        `?idle_within_s=N` waits until none is open, `?phase=P&within_s=N` until a room is in phase P. The status is 503
        if that is not so after N seconds. `?oldest=N` shows the N rooms that were opened first, the number of all
        (`kept`) and counts since the start (`counts`, see `_counts`). Its cost does not depend on the number of rooms,
        while all other forms recount every room.
        """
        if "oldest" in http.query:
            text = http.query["oldest"]
            if not _is_number(_WHOLE, text) or not 1 <= int(text) <= MAX_SHOWN:
                raise BadRequest(f"oldest={text[:40]!r}: give a whole number in [1, {MAX_SHOWN}]", "oldest")
            return web.json_response(await asyncio.to_thread(self._open_rooms, int(text)))
        if "phase" in http.query:
            phase, within_s = http.query["phase"], _seconds(http.query, "within_s")
            if phase not in Phase.__members__:
                raise BadRequest(f"phase={phase[:40]!r}: give one of {', '.join(Phase.__members__)}", "phase")

            def is_there(body: Body) -> bool:
                return any(room["phase"] == phase for room in body["open"])

            seen = await self._open.until(is_there, within_s, every_s=_CHECK_EVERY_S)
            if seen is None:
                return _json(await asyncio.to_thread(self._open_rooms), 503)
            return web.json_response(seen)
        idle = True
        if "idle_within_s" in http.query:
            idle = await self._idle.until(bool, _seconds(http.query, "idle_within_s")) or False
        return _json(await asyncio.to_thread(self._open_rooms), 200 if idle else 503)

    def _open_rooms(self, oldest: int | None = None) -> Body:
        """Return the open rooms with an audit, or the `oldest` of them with the number of all."""
        manager = self._manager
        counted: Body = {}
        if oldest is None:
            counted["rooms"] = msgspec.to_builtins(manager.audit())
        else:
            metrics = manager.metrics()
            counted |= {"kept": metrics.census.kept, "counts": _counts(metrics)}
        shown = msgspec.to_builtins(manager.rooms(oldest))
        return {**self._extra(), **counted, "open": shown, "peers": manager.peers(), "now": time.time()}

    async def _room(self, http: web.Request) -> web.StreamResponse:
        """Answer with the views of one room, one for each side that is kept here; 404 if there is none."""
        text = http.match_info["number"]
        if not _is_number(_WHOLE, text) or int(text) >= ROOM_NUMBERS:
            raise BadRequest(f"invalid room number {text[:40]!r}: give a whole number in [0, 2**63)", "room")
        number = int(text)
        views = await asyncio.to_thread(self._manager.room, number)
        if not views:
            return error_response(
                404,
                f"room {number} is not open on this worker: it has not been opened yet, or it has ended and is"
                " forgotten; /metrics counts ended rooms, and the worker's log has the reason of each failure",
                "room",
            )
        return web.json_response({"room": number, "views": msgspec.to_builtins(views), "now": time.time()})

    async def _fence(self, http: web.Request) -> web.StreamResponse:
        """Declare lost peers to be gone, and answer with them and the pages of rooms here that waited for their end.

        400 if no lost peer is there. Only a body with the content type of JSON is read: a web page cannot send one to
        another site.
        """
        body = await http.read()
        if http.content_type != "application/json":
            raise BadRequest("send the body as application/json", "host")
        try:
            fields = msgspec.json.decode(body, type=dict[str, str])
            place = parse_address(fields["peer"]) if list(fields) == ["peer"] else read_host(fields["host"])
            if len(fields) != 1:
                raise KeyError
        except (*UNDECODABLE, KeyError):
            raise BadRequest('send {"host": "10.0.0.1"} or {"peer": "10.0.0.1:7000"}', "host") from None
        except ConfigurationError as error:
            raise BadRequest(str(error), "host") from None
        found = await asyncio.to_thread(self._manager.fence, str(place))
        return web.json_response({"fenced": msgspec.to_builtins(found)})


def _json(body: Body, status: int) -> web.Response:
    return web.json_response(body, status=status, headers=unavailable_headers(status))


def _counts(now: Metrics) -> Body:
    """Return the counts since the start from which `kvroom rooms` computes rates, both sides of the manager together.

    `ended` counts rooms by cause, with "" for those that were handed over. `handoff_s` and `nbytes` are sums over
    `handed_over` hand-offs. `quarantined_pages` is the number of pages now.
    """
    ended: dict[str, int] = {}
    for (_, cause), rooms in now.counters.ended.items():
        name = "" if cause is None else cause.value
        ended[name] = ended.get(name, 0) + rooms
    sums = now.hand_offs.values()
    return {
        "opened": now.counters.opened,
        "ended": ended,
        "handed_over": sum(sum(side.counts) for side in sums),
        "handoff_s": sum(side.total_s for side in sums),
        "nbytes": sum(side.nbytes for side in sums),
        "quarantined_pages": now.census.quarantined_pages,
    }


_WHOLE = re.compile(r"0|[1-9][0-9]*")
_DECIMAL = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_LONGEST = 20
"""Longest text that is parsed as a number. For thousands of digits, `int` would raise an error of its own."""


def _seconds(query: Mapping[str, str], name: str) -> float:
    text = query.get(name, "")
    if not _is_number(_DECIMAL, text) or not 0.0 < float(text) <= MAX_WAIT_S:
        raise BadRequest(f"{name}={text[:40]!r}: give seconds in (0, {MAX_WAIT_S:g}], for example 2 or 0.5", name)
    return float(text)


def _is_number(form: re.Pattern[str], text: str) -> bool:
    """Return True for a text of this form (ASCII digits, no sign, space or leading zero) that is not too long."""
    return len(text) <= _LONGEST and form.fullmatch(text) is not None

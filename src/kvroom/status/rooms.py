"""The window on a manager's rooms: what is open now, and one room's story. It looks, and takes the operator's word.

    GET /rooms                      every room, and an audit that recounts all of them
    GET /rooms?oldest=N             the N rooms that were opened first, and how many there are
    GET /rooms?idle_within_s=N      wait until nothing is open
    GET /rooms?phase=P&within_s=N   wait until a room is in phase P
    GET /rooms/{number}             one room, on each side of it that is kept here
    POST /fence                     {"host": H} or {"peer": "H:PORT"}: the processes of the lost peers there have ended

The manager is asked in another thread: a loop that serves this is never held up by one that moves rooms.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

from kvroom.core.phases import Phase
from kvroom.errors import ConfigurationError
from kvroom.runtime.handles import ROOM_NUMBERS
from kvroom.runtime.manager import KVManager
from kvroom.wire.address import parse_address, read_host
from kvroom.wire.frames import UNDECODABLE

from .answers import BadRequest, Body, error_response
from .looks import SharedLook

MAX_WAIT_S = 60.0
MAX_SHOWN = 10_000
_LOOK_EVERY_S = 0.01
_WAIT_AT_ONCE_S = 0.5
"""How long a thread waits at most for one who may have hung up, or for a server that is to end."""

Extra = Callable[[], Body]
"""Counts of whoever owns the manager, told with its rooms. Called in any thread, for each answer; JSON values only."""


class RoomsWindow:
    """The routes on the rooms of one manager. `is_idle_within(seconds)`, which blocks, says when nothing is open;
    an owner that keeps more than rooms gives its own."""

    def __init__(
        self, manager: KVManager, extra: Extra = dict, is_idle_within: Callable[[float], bool] | None = None
    ) -> None:
        self._manager = manager
        self._extra = extra
        is_idle = is_idle_within or manager.wait_idle
        self._idle = SharedLook(lambda: is_idle(_WAIT_AT_ONCE_S))
        self._open = SharedLook(self._whats_open)

    def routes(self) -> list[web.RouteDef]:
        """To be added to an application whose errors are told by `errors_as_json`."""
        return [
            web.get("/rooms", self._rooms),
            web.get("/rooms/{number}", self._room),
            web.post("/fence", self._fence),
        ]

    async def _rooms(self, http: web.Request) -> web.StreamResponse:
        """What is open now.

        `?idle_within_s=N` waits until nothing is, `?phase=P&within_s=N` until a room is in phase P; 503 when that has
        not come after N seconds. `?oldest=N`: the N rooms that were opened first, and of the others their number
        (`kept`); this costs the same whatever is open, while everything else recounts every room.
        """
        if "oldest" in http.query:
            text = http.query["oldest"]
            if not _reads(_WHOLE, text) or not 1 <= int(text) <= MAX_SHOWN:
                raise BadRequest(f"oldest={text[:40]!r}: give a whole number in [1, {MAX_SHOWN}]", "oldest")
            return web.json_response(await asyncio.to_thread(self._whats_open, int(text)))
        if "phase" in http.query:
            phase, within_s = http.query["phase"], _seconds(http.query, "within_s")
            if phase not in Phase.__members__:
                raise BadRequest(f"phase={phase[:40]!r}: give one of {', '.join(Phase.__members__)}", "phase")

            def is_there(body: Body) -> bool:
                return any(room["phase"] == phase for room in body["open"])

            seen = await self._open.until(is_there, within_s, every_s=_LOOK_EVERY_S)
            if seen is None:
                return web.json_response(await asyncio.to_thread(self._whats_open), status=503)
            return web.json_response(seen)
        idle = True
        if "idle_within_s" in http.query:
            idle = await self._idle.until(bool, _seconds(http.query, "idle_within_s")) or False
        return web.json_response(await asyncio.to_thread(self._whats_open), status=200 if idle else 503)

    def _whats_open(self, oldest: int | None = None) -> Body:
        """Return the open rooms. All of them come with a recount, the `oldest` of them with their number alone."""
        manager = self._manager
        counted: Body = {}
        if oldest is None:
            counted["rooms"] = msgspec.to_builtins(manager.audit())
        else:
            counted["kept"] = manager.metrics().census.kept
        shown = msgspec.to_builtins(manager.rooms(oldest))
        return {**self._extra(), **counted, "open": shown, "peers": manager.peers()}

    async def _room(self, http: web.Request) -> web.StreamResponse:
        """One room: each side of it that is kept here, with its timeline. 404 when there is none, whatever it was."""
        text = http.match_info["number"]
        if not _reads(_WHOLE, text) or int(text) >= ROOM_NUMBERS:
            raise BadRequest(f"{text[:40]!r} is no room number: give a whole number of at least 0, below 2**63", "room")
        number = int(text)
        views = await asyncio.to_thread(self._manager.room, number)
        if not views:
            return error_response(
                404,
                f"room {number} is not open on this worker: it has not come yet or has ended, and nothing is remembered"
                " of ended rooms; /metrics counts them, the log of the worker says why they failed",
                "room",
            )
        return web.json_response({"room": number, "views": msgspec.to_builtins(views)})

    async def _fence(self, http: web.Request) -> web.StreamResponse:
        """The lost peers that the operator declares to be gone, and the pages of rooms here that waited for their end.

        400 if no lost peer is there. Only a body that says it is JSON is read, which a page in a browser cannot send to
        another site.
        """
        body = await http.read()
        if http.content_type != "application/json":
            raise BadRequest("send the body as application/json", "host")
        try:
            said = msgspec.json.decode(body, type=dict[str, str])
            place = parse_address(said["peer"]) if list(said) == ["peer"] else read_host(said["host"])
            if len(said) != 1:
                raise KeyError
        except (*UNDECODABLE, KeyError):
            raise BadRequest('give one of {"host": "10.0.0.1"} and {"peer": "10.0.0.1:7000"}', "host") from None
        except ConfigurationError as error:
            raise BadRequest(str(error), "host") from None
        found = await asyncio.to_thread(self._manager.fence, str(place))
        return web.json_response({"fenced": msgspec.to_builtins(found)})


_WHOLE = re.compile(r"0|[1-9][0-9]*")
_DECIMAL = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_LONGEST = 20
"""Characters of the longest text that is read as a number. Python refuses to read thousands of digits by an error."""


def _seconds(query: Mapping[str, str], name: str) -> float:
    text = query.get(name, "")
    if not _reads(_DECIMAL, text) or not 0.0 < float(text) <= MAX_WAIT_S:
        raise BadRequest(f"{name}={text[:40]!r}: give seconds in (0, {MAX_WAIT_S:g}], for example 2 or 0.5", name)
    return float(text)


def _reads(form: re.Pattern[str], text: str) -> bool:
    """Return whether a text has this form: ASCII digits without sign, space or leading zero, and not too many."""
    return len(text) <= _LONGEST and form.fullmatch(text) is not None

"""Which data-parallel group of a prefill server serves a room, for many rooms at once and without a flood.

A server that follows room numbers needs no question. Otherwise somebody registers each room's group in the server's
directory, and the decode ranks ask for it. Whatever the number of rooms, there is one request in flight to each
directory, and they begin `PACE_S` apart at least:

    some rooms were not asked for yet    ask for all that wait; the directory answers at once
    all were asked for                   ask again; the directory answers when the first of them is registered

Nothing remains of a room after its answer, its deadline or its cancellation: what waits belongs to the waiting call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import chain, islice

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import MAX_QUERIED_ROOMS, MAX_RANKS, NotReady, ServerInfo
from kvroom.dialling.allowed import AllowList
from kvroom.errors import BootstrapError, KVRoomError
from kvroom.plan import dp_rank_of

from .within import within

PACE_S = 0.02
WAIT_S = 10.0
CROWD_WAIT_S = 0.2
"""How long the directory waits where more wait than one query can name: the others want their turn."""
RETRY_S = 0.2


@dataclass(eq=False)
class _Call:
    """A call that waits: to be told its room's group, or until the directory was told."""

    room: int
    dp_rank: int
    done: asyncio.Future[int]
    error: str = ""
    """Why the last request that named it was not answered."""

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(BootstrapError(f"data-parallel rank of room {self.room}: {why}"))


@dataclass(eq=False)
class _Line:
    """The calls that wait for one directory. Those in `asked` were named in a request that was answered."""

    address: str
    fresh: dict[_Call, None] = field(default_factory=dict)
    asked: dict[_Call, None] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call comes, and when the last one goes."""
    task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self.fresh) + len(self.asked)

    def join(self, call: _Call) -> None:
        self.fresh[call] = None
        self.changed.set()

    def leave(self, call: _Call) -> bool:
        """Whether it was waiting."""
        was_here = call in self.fresh or call in self.asked
        self.fresh.pop(call, None)
        self.asked.pop(call, None)
        if not len(self):
            self.changed.set()
        return was_here

    def next(self) -> list[_Call]:
        """As many as one request may name: those that were never asked for, then those that wait longest."""
        self.changed.clear()
        return list(islice(chain(self.fresh, self.asked), MAX_QUERIED_ROOMS))

    def answer(self, call: _Call, dp_rank: int | None) -> None:
        """None: not known yet. It goes to the end of those that wait."""
        if not self.leave(call):
            return
        if dp_rank is None:
            call.error = ""
            self.asked[call] = None
        elif not call.done.done():
            call.done.set_result(dp_rank)

    def fail(self, calls: list[_Call], why: str) -> None:
        for call in calls:
            if self.leave(call):
                call.fail(why)


class Routing:
    """For the loop of one manager. `secret` as that of the directories; `patience_s`: how long a call may wait.

    `allowed`: the directories that may be asked; None: all.
    """

    def __init__(self, secret: bytes, patience_s: float, allowed: AllowList | None = None) -> None:
        self._secret = secret
        self._allowed = allowed
        self._patience_s = patience_s
        self._queries: dict[str, _Line] = {}
        self._reports: dict[str, _Line] = {}
        self._closed = False

    @property
    def pending(self) -> int:
        """How many calls wait."""
        return sum(map(len, self._lines()))

    async def dp_rank(self, bootstrap_addr: str, server: ServerInfo, room: int, patience_s: float | None = None) -> int:
        """The group of the server behind `bootstrap_addr` that serves the room, in [0, `server.dp_size`).

        `BootstrapError` names room and directory: it refuses, does not answer, or was not told within `patience_s` (as
        the constructor has it, if it is not given), or was told of a group that the server lacks.
        """
        if server.dp_size == 1:
            return 0
        if server.follow_bootstrap_room:
            return dp_rank_of(room, server.dp_size)
        dp_rank = await self._wait(self._queries, self._ask, bootstrap_addr, room, patience_s=patience_s)
        if dp_rank >= server.dp_size:
            raise BootstrapError(
                f"data-parallel rank of room {room}: the directory at {bootstrap_addr} was told {dp_rank}, but the "
                f"server has {server.dp_size}: register one in [0, {server.dp_size})"
            )
        return dp_rank

    async def register(self, bootstrap_addr: str, room: int, dp_rank: int) -> None:
        """Tell the directory which group serves a room, and return when it knows. `BootstrapError` if it may not."""
        await self._wait(self._reports, self._tell, bootstrap_addr, room, dp_rank=dp_rank)

    async def close(self) -> None:
        """End every request; the calls that wait raise `BootstrapError`, as later ones do."""
        self._closed = True
        lines = self._lines()
        for line in lines:
            line.fail([*line.fresh, *line.asked], "the manager was closed")
        tasks = [line.task for line in lines if line.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lines(self) -> list[_Line]:
        return [*self._queries.values(), *self._reports.values()]

    async def _wait(
        self,
        lines: dict[str, _Line],
        request: Callable[[_Line], Awaitable[float]],
        address: str,
        room: int,
        *,
        dp_rank: int = 0,
        patience_s: float | None = None,
    ) -> int:
        patience_s = self._patience_s if patience_s is None else patience_s
        call = _Call(room, dp_rank, asyncio.get_running_loop().create_future())
        # Numbers are looked at here, because a directory refuses the whole request for the sake of one.
        if self._closed:
            call.fail("the manager was closed")
        elif not 0 <= room < 2**63:
            call.fail("a room number is in [0, 2**63)")
        elif not 0 <= dp_rank < MAX_RANKS:
            call.fail(f"{dp_rank} cannot be registered: give a rank in [0, {MAX_RANKS})")
        if call.done.done():
            return call.done.result()
        line = lines.get(address)
        if line is None:
            line = lines[address] = _Line(address)
            line.task = asyncio.create_task(_serve(lines, line, request), name=f"data-parallel ranks at {address}")
        line.join(call)
        try:
            return await within(call.done, patience_s)
        except asyncio.TimeoutError:
            why = f"the directory at {address} has not answered; is it up?"
            if call in line.asked:
                why = f"the directory at {address} was not told; does the router or the prefill worker register rooms?"
            raise BootstrapError(
                f"data-parallel rank of room {room}: not known within {patience_s:.3g} s: {call.error or why}"
            ) from None
        finally:
            line.leave(call)

    async def _ask(self, line: _Line) -> float:
        """Ask for all that wait. Returns how long the next request should stay away."""
        calls = line.next()
        wait_s = 0.0 if line.fresh else WAIT_S if len(line) <= MAX_QUERIED_ROOMS else CROWD_WAIT_S
        rooms = {call.room for call in calls}
        query = asyncio.create_task(
            client.query_dp_ranks(line.address, rooms, wait_s=wait_s, secret=self._secret, allowed=self._allowed)
        )
        changed = asyncio.create_task(line.changed.wait())
        try:
            # One that does not wait is never cut short: however many come, those that wait get their answers.
            await asyncio.wait({query, changed} if wait_s else {query}, return_when=asyncio.FIRST_COMPLETED)
            if not query.done():
                return PACE_S
            found = query.result()
        except NotReady as error:
            for call in calls:
                call.error = str(error)
            return RETRY_S
        except KVRoomError as error:
            line.fail(calls, str(error))
            return PACE_S
        finally:
            query.cancel()
            changed.cancel()
            await asyncio.gather(query, changed, return_exceptions=True)
        for call in calls:
            line.answer(call, found.get(call.room))
        return PACE_S

    async def _tell(self, line: _Line) -> float:
        """Register all that wait. Returns how long the next request should stay away."""
        calls = line.next()
        try:
            dp_ranks = {call.room: call.dp_rank for call in calls}
            await client.register_dp_ranks(line.address, dp_ranks, secret=self._secret)
        except KVRoomError as error:
            line.fail(calls, str(error))
        else:
            for call in calls:
                line.answer(call, call.dp_rank)
        return PACE_S


async def _serve(lines: dict[str, _Line], line: _Line, request: Callable[[_Line], Awaitable[float]]) -> None:
    """One request after the other, until nobody waits."""
    loop = asyncio.get_running_loop()
    try:
        while len(line):
            start_s = loop.time()
            pause_s = await request(line)
            await asyncio.sleep(start_s + pause_s - loop.time())
    finally:
        del lines[line.address]
        line.fail([*line.fresh, *line.asked], f"requests to the directory at {line.address} broke off; see the log")

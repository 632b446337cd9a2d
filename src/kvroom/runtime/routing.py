"""The data-parallel group of a prefill server that serves a room, found for many rooms by few requests.

A server that assigns groups by room number needs no query. Otherwise the router or the prefill worker registers each
room's group in the server's directory, and the decode ranks query it. However many rooms wait, one request is in flight
to each directory, and requests begin at least `PACE_S` apart:

    some rooms were not in a request yet    query all that wait; the directory answers immediately
    all rooms were in one                   query again; the directory answers when the first of them is registered

After its answer, its deadline or its cancellation nothing is kept for a room: the queue holds only waiting calls.
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
"""Least time between the starts of two requests to one directory."""
WAIT_S = 10.0
"""Time that the directory may wait for a registration before it answers a query."""
CROWDED_WAIT_S = 0.2
"""The same if more rooms wait than one query can name, so that the others get their turn."""
RETRY_S = 0.2
"""The same as `PACE_S` after a directory that was not ready."""


@dataclass(eq=False)
class _Call:
    """A waiting call: for the group of its room, or for the registration of that group."""

    room: int
    dp_rank: int
    done: asyncio.Future[int]
    error: str = ""
    """The reason why the last request that named it was not answered."""

    def fail(self, why: str) -> None:
        """Raise `BootstrapError` in the caller, unless the call has ended."""
        if not self.done.done():
            self.done.set_exception(BootstrapError(f"data-parallel rank of room {self.room}: {why}"))


@dataclass(eq=False)
class _RoomQueue:
    """The calls that wait for one directory. Those in `asked` were named in a request that was answered."""

    address: str
    fresh: dict[_Call, None] = field(default_factory=dict)
    asked: dict[_Call, None] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a call joins, and when the last one leaves."""
    task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self.fresh) + len(self.asked)

    def join(self, call: _Call) -> None:
        """Queue a call for the next request."""
        self.fresh[call] = None
        self.changed.set()

    def leave(self, call: _Call) -> bool:
        """Remove a call. Return False if it was not in the queue."""
        was_here = call in self.fresh or call in self.asked
        self.fresh.pop(call, None)
        self.asked.pop(call, None)
        if not len(self):
            self.changed.set()
        return was_here

    def next(self) -> list[_Call]:
        """Return the calls for the next request, as many as it may name: new ones first, then the oldest others."""
        self.changed.clear()
        return list(islice(chain(self.fresh, self.asked), MAX_QUERIED_ROOMS))

    def answer(self, call: _Call, dp_rank: int | None) -> None:
        """End a call with its group. If the group is None, not known yet, move the call to the end of the queue."""
        if not self.leave(call):
            return
        if dp_rank is None:
            call.error = ""
            self.asked[call] = None
        elif not call.done.done():
            call.done.set_result(dp_rank)

    def fail(self, calls: list[_Call], why: str) -> None:
        """Remove these calls and raise `BootstrapError` in their callers."""
        for call in calls:
            if self.leave(call):
                call.fail(why)


class Routing:
    """The queries and registrations of one manager. All methods run on its loop.

    Args:
        secret: the secret of the directories.
        patience_s: limit for one call.
        allowed: the directories that may be queried; None: all.
    """

    def __init__(self, secret: bytes, patience_s: float, allowed: AllowList | None = None) -> None:
        self._secret = secret
        self._allowed = allowed
        self._patience_s = patience_s
        self._queries: dict[str, _RoomQueue] = {}
        self._reports: dict[str, _RoomQueue] = {}
        self._closed = False

    @property
    def pending(self) -> int:
        """The number of waiting calls."""
        return sum(map(len, self._queues()))

    async def dp_rank(self, bootstrap_addr: str, server: ServerInfo, room: int, patience_s: float | None = None) -> int:
        """Return the group of the server behind `bootstrap_addr` that serves the room, in [0, `server.dp_size`).

        Raises:
            BootstrapError: the directory refuses or does not answer, no group was registered within `patience_s` (by
                default the constructor's), or the registered group does not exist. The text names room and directory.
        """
        if server.dp_size == 1:
            return 0
        if server.follow_bootstrap_room:
            return dp_rank_of(room, server.dp_size)
        dp_rank = await self._wait(self._queries, self._ask, bootstrap_addr, room, patience_s=patience_s)
        if dp_rank >= server.dp_size:
            raise BootstrapError(
                f"data-parallel rank of room {room}: expected a rank in [0, {server.dp_size}), got {dp_rank} from the "
                f"directory at {bootstrap_addr}: register a rank that the server has"
            )
        return dp_rank

    async def register(self, bootstrap_addr: str, room: int, dp_rank: int) -> None:
        """Register the group of a room in the directory, and return when that is done.

        Raises:
            BootstrapError: the directory refuses or does not answer.
        """
        await self._wait(self._reports, self._tell, bootstrap_addr, room, dp_rank=dp_rank)

    async def close(self) -> None:
        """End every request. Waiting calls raise `BootstrapError`, and later calls too."""
        self._closed = True
        queues = self._queues()
        for queue in queues:
            queue.fail([*queue.fresh, *queue.asked], "the manager was closed")
        tasks = [queue.task for queue in queues if queue.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _queues(self) -> list[_RoomQueue]:
        return [*self._queries.values(), *self._reports.values()]

    async def _wait(
        self,
        queues: dict[str, _RoomQueue],
        request: Callable[[_RoomQueue], Awaitable[float]],
        address: str,
        room: int,
        *,
        dp_rank: int = 0,
        patience_s: float | None = None,
    ) -> int:
        patience_s = self._patience_s if patience_s is None else patience_s
        call = _Call(room, dp_rank, asyncio.get_running_loop().create_future())
        # Invalid numbers are refused here: a directory would refuse the whole request, with all other rooms in it.
        if self._closed:
            call.fail("the manager was closed")
        elif not 0 <= room < 2**63:
            call.fail("invalid room number: give one in [0, 2**63)")
        elif not 0 <= dp_rank < MAX_RANKS:
            call.fail(f"invalid rank {dp_rank}: give one in [0, {MAX_RANKS})")
        if call.done.done():
            return call.done.result()
        queue = queues.get(address)
        if queue is None:
            queue = queues[address] = _RoomQueue(address)
            queue.task = asyncio.create_task(_serve(queues, queue, request), name=f"data-parallel ranks at {address}")
        queue.join(call)
        try:
            return await within(call.done, patience_s)
        except asyncio.TimeoutError:
            why = f"the directory at {address} has not answered; is it up?"
            if call in queue.asked:
                why = f"none is registered at {address}; does the router or the prefill worker register rooms there?"
            raise BootstrapError(
                f"data-parallel rank of room {room}: timed out after {patience_s:.3g} s: {call.error or why}"
            ) from None
        finally:
            queue.leave(call)

    async def _ask(self, queue: _RoomQueue) -> float:
        """Query the groups of all waiting rooms. Return the least time until the next request."""
        calls = queue.next()
        wait_s = 0.0 if queue.fresh else WAIT_S if len(queue) <= MAX_QUERIED_ROOMS else CROWDED_WAIT_S
        rooms = {call.room for call in calls}
        query = asyncio.create_task(
            client.query_dp_ranks(queue.address, rooms, wait_s=wait_s, secret=self._secret, allowed=self._allowed)
        )
        changed = asyncio.create_task(queue.changed.wait())
        try:
            # A new call cuts a waiting query short, so that it is in a request soon. A query that does not wait is
            # never cut short: with a steady stream of new calls, no query would ever be answered.
            await asyncio.wait({query, changed} if wait_s else {query}, return_when=asyncio.FIRST_COMPLETED)
            if not query.done():
                return PACE_S
            found = query.result()
        except NotReady as error:
            for call in calls:
                call.error = str(error)
            return RETRY_S
        except KVRoomError as error:
            queue.fail(calls, str(error))
            return PACE_S
        finally:
            query.cancel()
            changed.cancel()
            await asyncio.gather(query, changed, return_exceptions=True)
        for call in calls:
            queue.answer(call, found.get(call.room))
        return PACE_S

    async def _tell(self, queue: _RoomQueue) -> float:
        """Register the groups of all waiting rooms. Return the least time until the next request."""
        calls = queue.next()
        try:
            dp_ranks = {call.room: call.dp_rank for call in calls}
            await client.register_dp_ranks(queue.address, dp_ranks, secret=self._secret)
        except KVRoomError as error:
            queue.fail(calls, str(error))
        else:
            for call in calls:
                queue.answer(call, call.dp_rank)
        return PACE_S


async def _serve(
    queues: dict[str, _RoomQueue], queue: _RoomQueue, request: Callable[[_RoomQueue], Awaitable[float]]
) -> None:
    """Send one request after the other until no call waits, then remove the queue."""
    loop = asyncio.get_running_loop()
    try:
        while len(queue):
            start_s = loop.time()
            pause_s = await request(queue)
            await asyncio.sleep(start_s + pause_s - loop.time())
    finally:
        del queues[queue.address]
        queue.fail([*queue.fresh, *queue.asked], f"internal error in requests to {queue.address}: see the log")

"""Rooms to data-parallel ranks: one request for many rooms, pushed answers, and nothing left of a room afterwards."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import pytest

from kvroom.bootstrap import client
from kvroom.bootstrap.directory import MAX_QUERIED_ROOMS, Directory, RankInfo
from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.errors import BootstrapError
from kvroom.runtime import routing
from kvroom.runtime.routing import PACE_S, Routing

SECRET = b"a secret for tests, long enough"
SERVER = RankInfo(rank_ip="h", rank_port=1, page_size=1, attn_dp_size=8, load_balance_method="round_robin").server


class Query(NamedTuple):
    at_s: float
    rooms: frozenset[int]
    wait_s: float


class Watch:
    """Every query: `queries` in the order of sending, `sent` to wait for the next one, `at_once` the most in flight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queries: list[Query] = []
        self.sent: asyncio.Queue[Query] = asyncio.Queue()
        self.at_once = 0
        self._in_flight = 0
        self._real = client.query_dp_ranks
        monkeypatch.setattr(client, "query_dp_ranks", self._query)

    async def _query(self, address: str, rooms: Iterable[int], *, wait_s: float = 0, **options: Any) -> Any:
        query = Query(asyncio.get_running_loop().time(), frozenset(rooms), wait_s)
        self.queries.append(query)
        self.sent.put_nowait(query)
        self._in_flight += 1
        self.at_once = max(self.at_once, self._in_flight)
        try:
            return await self._real(address, query.rooms, wait_s=wait_s, **options)
        finally:
            self._in_flight -= 1


Test = Callable[[Routing, KVBootstrapServer], Awaitable[None]]


def run(test: Test, *, patience_s: float = 30, secret: bytes = SECRET, **limits: Any) -> None:
    """Run a test's body beside a directory; afterwards no call waits, no query waits and no task is left."""

    async def body() -> None:
        async with KVBootstrapServer(secret=SECRET, directory=Directory(**limits)) as server:
            asking = Routing(secret, patience_s)
            try:
                await test(asking, server)
                assert asking.pending == 0
            finally:
                await asking.close()
            await until_nobody_waits(server)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


async def until_nobody_waits(server: KVBootstrapServer) -> None:
    """Query the server until it has noticed the closed connection, which takes some turns."""
    start_s = asyncio.get_running_loop().time()
    while server._waiters:
        assert asyncio.get_running_loop().time() - start_s < routing.WAIT_S / 2
        await client.query_dp_ranks(server.address, [], secret=SECRET)


async def register(server: KVBootstrapServer, dp_ranks: dict[int, int]) -> None:
    await client.register_dp_ranks(server.address, dp_ranks, secret=SECRET)


def test_a_server_that_follows_room_numbers_or_has_one_group_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    follows = msgspec.structs.replace(SERVER, follow_bootstrap_room=True)
    single = msgspec.structs.replace(SERVER, dp_size=1)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        assert [await asking.dp_rank(server.address, follows, room) for room in (7, 8, 9)] == [7, 0, 1]
        assert await asking.dp_rank(server.address, single, 9) == 0

    run(test)
    assert not watch.queries


def test_many_rooms_are_asked_for_and_registered_in_one_request_each(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    posts: list[int] = []

    class Counting(Directory):
        def register_dp_ranks(self, dp_ranks: Any, now_s: float) -> None:
            posts.append(len(dp_ranks))
            super().register_dp_ranks(dp_ranks, now_s)

    async def body() -> None:
        async with KVBootstrapServer(directory=Counting()) as server:
            decode, prefill = Routing(b"", 30), Routing(b"", 30)
            rooms = range(3000)
            answers = asyncio.gather(*(decode.dp_rank(server.address, SERVER, room) for room in rooms))
            first, second = await watch.sent.get(), await watch.sent.get()
            assert (first.rooms, first.wait_s) == (frozenset(rooms), 0)
            assert (second.rooms, second.wait_s) == (frozenset(rooms), routing.WAIT_S)
            assert decode.pending == 3000
            await asyncio.gather(*(prefill.register(server.address, room, room % 8) for room in rooms))
            assert await answers == [room % 8 for room in rooms]
            assert (len(watch.queries), posts) == (2, [3000])
            assert decode.pending == prefill.pending == 0
            await decode.close()
            await prefill.close()

    asyncio.run(body())


def test_more_rooms_than_a_query_may_name_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    monkeypatch.setattr(routing, "WAIT_S", 30.0)
    rooms = range(2 * MAX_QUERIED_ROOMS + 10)
    late = rooms[-1]

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        answers = [asyncio.ensure_future(asking.dp_rank(server.address, SERVER, room)) for room in rooms]
        asked: set[int] = set()
        while asked != set(rooms):
            query = await watch.sent.get()
            assert len(query.rooms) <= MAX_QUERIED_ROOMS
            asked |= query.rooms
        while query.wait_s == 0 or late in query.rooms:
            query = await watch.sent.get()
        await register(server, {late: 3})  # while the directory holds a query that does not name it
        assert await answers[late] == 3
        for block in range(0, late, MAX_QUERIED_ROOMS):
            await register(server, {room: 1 for room in rooms[block : block + MAX_QUERIED_ROOMS] if room != late})
        assert set(await asyncio.gather(*answers[:late])) == {1}

    run(test, patience_s=15)
    assert watch.at_once == 1


def test_a_room_that_comes_later_does_not_wait_for_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory would hold the query in flight for `WAIT_S`, which is longer than the room's deadline."""
    watch = Watch(monkeypatch)
    monkeypatch.setattr(routing, "WAIT_S", 30.0)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        patient = asyncio.ensure_future(asking.dp_rank(server.address, SERVER, 1))
        assert (await watch.sent.get()).wait_s == 0
        assert (await watch.sent.get()).wait_s == 30
        await register(server, {2: 5})
        assert await asking.dp_rank(server.address, SERVER, 2) == 5
        await register(server, {1: 4})
        assert await patient == 4

    run(test, patience_s=5)
    assert watch.at_once == 1


def test_who_comes_all_the_time_starves_nobody_and_is_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new room arrives with every query, so each waiting query is cut short."""
    watch = Watch(monkeypatch)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        first = asyncio.ensure_future(asking.dp_rank(server.address, SERVER, 0))
        others = []
        for room in range(1, 12):
            await watch.sent.get()
            others.append(asyncio.ensure_future(asking.dp_rank(server.address, SERVER, room)))
        await register(server, {0: 6})
        while not first.done():
            await watch.sent.get()
            others.append(asyncio.ensure_future(asking.dp_rank(server.address, SERVER, 100 + len(others))))
            assert len(others) < 30
        assert await first == 6
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    run(test)
    gaps = [later.at_s - earlier.at_s for earlier, later in zip(watch.queries, watch.queries[1:], strict=False)]
    assert min(gaps) >= PACE_S * 0.9
    assert watch.at_once == 1


def test_two_calls_for_one_room_both_get_the_answer() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        await register(server, {9: 2})
        assert await asyncio.gather(*(asking.dp_rank(server.address, SERVER, 9) for _ in range(2))) == [2, 2]

    run(test)


def test_nothing_remains_of_a_room_that_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        calls = [asyncio.ensure_future(asking.dp_rank(server.address, SERVER, room)) for room in range(50)]
        while (await watch.sent.get()).wait_s == 0:
            assert asking.pending == 50
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert asking.pending == 0
        await until_nobody_waits(server)  # the directory was told, too
        for queue in asking._queues():
            assert queue.task is not None
            await queue.task
        assert asking._queues() == []

    run(test)


def test_a_room_that_nobody_registers_ends_at_its_deadline_by_name() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        says = rf"rank of room 7: timed out after 0\.3 s: none is registered at {server.address}"
        with pytest.raises(BootstrapError, match=says):
            await asking.dp_rank(server.address, SERVER, 7)

    run(test, patience_s=0.3)


def test_a_directory_that_does_not_answer_is_named() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            address = f"127.0.0.1:{deaf.getsockname()[1]}"
            for call in (asking.dp_rank(address, SERVER, 7), asking.register(address, 7, 0)):
                with pytest.raises(BootstrapError, match=rf"room 7: .* directory at {address} has not answered; is it"):
                    await call
        with pytest.raises(BootstrapError, match=rf"room 7: timed out .*{address}: connection refused"):
            await asking.dp_rank(address, SERVER, 7)
        with pytest.raises(BootstrapError, match=rf"room 7: .*{address}: connection refused"):
            await asking.register(address, 7, 0)

    run(test, patience_s=0.3)


def test_the_reason_given_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory starts after a refused query and names no rank; another stops after it has answered."""
    watch = Watch(monkeypatch)

    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = f"127.0.0.1:{port}"
        asking = Routing(b"", 1.5)
        call = asyncio.ensure_future(asking.dp_rank(address, SERVER, 7))
        await watch.sent.get()
        await watch.sent.get()  # so the first one was refused
        async with KVBootstrapServer(port=port):
            with pytest.raises(BootstrapError, match=r"room 7: .* none is registered at"):
                await call
            call = asyncio.ensure_future(asking.dp_rank(address, SERVER, 8))
            while (await watch.sent.get()).wait_s == 0 or 8 not in watch.queries[-1].rooms:
                pass
        with pytest.raises(BootstrapError, match=r"room 8: .*connection refused"):
            await call
        await asking.close()

    asyncio.run(body())


def test_a_directory_that_comes_late_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        asking = Routing(b"", 30)
        watch = Watch(monkeypatch)
        answer = asyncio.ensure_future(asking.dp_rank(f"127.0.0.1:{port}", SERVER, 7))
        await watch.sent.get()
        await watch.sent.get()  # so the first one was refused
        async with KVBootstrapServer(port=port) as server:
            await client.register_dp_rank(server.address, 7, 3)
            assert await answer == 3
        await asking.close()

    asyncio.run(body())


def test_a_refusal_ends_every_room_that_was_asked_for_at_once() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        calls = [asking.dp_rank(server.address, SERVER, room) for room in (7, 8)]
        faults = await asyncio.gather(*calls, return_exceptions=True)
        for room, error in zip((7, 8), faults, strict=True):
            assert isinstance(error, BootstrapError)
            assert f"room {room}: bootstrap directory {server.address} refused" in str(error)
            assert "KVROOM_SECRET" in str(error)
        with pytest.raises(BootstrapError, match=r"room 9: .*KVROOM_SECRET"):
            await asking.register(server.address, 9, 0)

    run(test, secret=b"another secret, long enough")


def test_a_group_that_the_server_lacks_is_named() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        await register(server, {7: 8})
        with pytest.raises(
            BootstrapError, match=rf"room 7: expected a rank in \[0, 8\), got 8 from the directory at {server.address}"
        ):
            await asking.dp_rank(server.address, SERVER, 7)

    run(test)


def test_what_cannot_be_registered_harms_no_other_room() -> None:
    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        good = asyncio.gather(*(asking.register(server.address, room, 1) for room in range(3)))
        with pytest.raises(BootstrapError, match="room 4: invalid rank 4096: give one in"):
            await asking.register(server.address, 4, 4096)
        with pytest.raises(BootstrapError, match=r"room -1: invalid room number: give one in \[0, 2\*\*63\)"):
            await asking.dp_rank(server.address, SERVER, -1)
        await good
        with pytest.raises(BootstrapError, match=r"room 3: .*it has reached a limit of open files"):
            await asking.register(server.address, 3, 1)

    run(test, max_hints=3)


def test_closing_ends_the_calls_that_wait_and_those_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        call = asyncio.ensure_future(asking.dp_rank(server.address, SERVER, 7))
        await watch.sent.get()
        await asking.close()
        with pytest.raises(BootstrapError, match="room 7: the manager was closed"):
            await call
        with pytest.raises(BootstrapError, match="room 8: the manager was closed"):
            await asking.register(server.address, 8, 0)

    run(test)


def test_closing_does_not_wait_for_a_directory_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            call = asyncio.ensure_future(asking.dp_rank(f"127.0.0.1:{deaf.getsockname()[1]}", SERVER, 7))
            await watch.sent.get()
            await asyncio.wait_for(asking.close(), client.TIMEOUT_S / 2)
            with pytest.raises(BootstrapError, match="room 7: the manager was closed"):
                await call

    run(test)


def test_a_fault_of_our_own_is_no_silence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("a planted bug")

    monkeypatch.setattr(client, "query_dp_ranks", broken)

    async def test(asking: Routing, server: KVBootstrapServer) -> None:
        with pytest.raises(BootstrapError, match=f"room 7: internal error in requests to {server.address}"):
            await asking.dp_rank(server.address, SERVER, 7)

    run(test)
    gc.collect()
    assert "a planted bug" in caplog.text

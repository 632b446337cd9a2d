"""A name that comes to mean another prefill server: the decode side's memory of the old one does not outlive it.

`Name` is what the decode side sees of a cluster's service: an address that does not change, and connections that lead
to whichever server is behind it when they are opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, RoomFailed, Timeouts
from kvroom.bootstrap.directory import Directory, RankInfo
from kvroom.errors import LinkError
from kvroom.plan import Parallel, Place
from kvroom.runtime import resolver
from kvroom.wire.address import parse_address
from kvroom_lab.pools import TestPool

TIMES = Timeouts(bootstrap_s=0.7, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)
PATIENT = Timeouts(bootstrap_s=20, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)
WAIT_S = 20.0
TOKENS = 8


class Name:
    """Forwards TCP connections to `target`, an address that may change; open connections stay where they are."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    far = socket.create_connection(parse_address(self.target))
                except ConnectionRefusedError:
                    near.close()
                    continue
                for one, other in ((near, far), (far, near)):
                    pump = threading.Thread(target=_pump, args=(one, other))
                    pump.start()
                    stack.callback(pump.join)


def _pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    one.close()


class Asked(Directory):
    """A directory that counts the requests for its ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def ranks(self, now_s: float) -> list[RankInfo]:
        self.times += 1
        return super().ranks(now_s)


class Prefill:
    """A prefill server: its directory, and a manager and a pool for each of its data-parallel ranks."""

    def __init__(self, stack: contextlib.ExitStack, seed: int, times: Timeouts, dp: int = 1) -> None:
        self.asked = Asked()
        self.directory = stack.enter_context(KVBootstrapServer(directory=self.asked))
        self.pools = [TestPool() for _ in range(dp)]
        self.managers = []
        for rank, pool in enumerate(self.pools):
            stack.callback(pool.close)
            pool.fill(seed + rank)
            manager = KVManager(
                pool.layout,
                transport="memory",
                register_with=self.directory.address,
                parallel=Parallel(dp=dp),
                place=Place(rank, 0, 0, 0),
                timeouts=times,
            )
            self.managers.append(stack.enter_context(manager))

    def end(self) -> None:
        for manager in self.managers:
            manager.close()
        self.directory.close()


class Story:
    """A name, the prefill server behind it, and a decode manager that has only the name."""

    def __init__(self, stack: contextlib.ExitStack, times: Timeouts, dp: int = 1) -> None:
        self.stack, self.times = stack, times
        self.pool = TestPool()
        stack.callback(self.pool.close)
        self.decode = stack.enter_context(KVManager(self.pool.layout, transport="memory", timeouts=times))
        self.a = self.prefill(1, dp)
        self.name = Name(self.a.directory.address)
        stack.callback(self.name.close)

    def prefill(self, seed: int, dp: int = 1) -> Prefill:
        return Prefill(self.stack, seed, self.times, dp)

    def swap(self, dp: int = 1) -> Prefill:
        """Let the name lead to a new server. The old one keeps running."""
        b = self.prefill(50, dp)
        self.name.target = b.directory.address
        return b

    def hand_over(self, room: int, server: Prefill, rank: int = 0) -> None:
        """Hand over one room of this server's rank, and compare every byte."""
        self.pool.array[:] = 0
        sender = server.managers[rank].sender(room, identity=PROMPT)
        with sender, self.decode.receiver(self.name.address, room, identity=PROMPT) as receiver:
            sender.send([2, 5], stop=TOKENS, last=True)
            receiver.send_metadata([7, 1], tokens=TOKENS)
            receiver.wait(WAIT_S)
            sender.wait(WAIT_S)
        assert np.array_equal(self.pool.tokens([7, 1], TOKENS), server.pools[rank].tokens([2, 5], TOKENS))

    def lose(self, room: int, server: Prefill) -> None:
        """Open a room of this server whose decode side goes to another one."""
        with (
            server.managers[0].sender(room, identity=PROMPT) as sender,
            self.decode.receiver(self.name.address, room, identity=PROMPT) as receiver,
        ):
            sender.send([2], stop=4, last=True)
            receiver.send_metadata([7], tokens=4)
            with pytest.raises(RoomFailed, match="the prefill side got no request for this room"):
                receiver.wait(WAIT_S)

    def sources(self, room: int) -> list[str]:
        """Return the addresses of the sources that the decode side remembers for a room."""
        found = self.decode.loop.call(lambda: self.decode._resolver.known(self.name.address, room))
        return [] if found is None else [str(peer) for peer in found.peers]


def until(predicate: Callable[[], bool]) -> None:
    """Poll the predicate; other threads get a turn after each try."""
    deadline_s = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < deadline_s


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def always_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every memory too old to answer, as after seconds in which no room was opened."""
    monkeypatch.setattr(resolver, "FRESH_S", 0)
    monkeypatch.setattr(resolver, "STALE_S", 0)


@pytest.fixture
def never_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every memory answer, and be renewed at the same time."""
    monkeypatch.setattr(resolver, "FRESH_S", 0)
    monkeypatch.setattr(resolver, "STALE_S", 3600)


def test_a_room_of_which_the_old_server_knows_nothing_sends_the_next_one_to_the_new_server(
    stack: contextlib.ExitStack,
) -> None:
    story = Story(stack, TIMES)
    story.hand_over(1, story.a)
    b = story.swap()
    story.lose(2, b)
    for room in (3, 4):
        story.hand_over(room, b)
    story.a.end()
    story.hand_over(5, b)
    assert story.decode.wait_idle(WAIT_S)
    assert story.decode.audit() == Audit()


@pytest.mark.usefixtures("always_old")
def test_after_a_pause_no_room_goes_to_the_old_server(stack: contextlib.ExitStack) -> None:
    story = Story(stack, PATIENT)
    story.hand_over(1, story.a)
    b = story.swap()
    for room in (2, 3):
        story.hand_over(room, b)


@pytest.mark.usefixtures("never_fresh")
def test_while_rooms_come_the_directory_is_asked_beside_them(stack: contextlib.ExitStack) -> None:
    story = Story(stack, PATIENT)
    story.hand_over(1, story.a)
    b = story.swap()
    story.hand_over(2, story.a)  # from memory, while the directory behind the name is queried
    until(lambda: story.sources(3) != [story.a.managers[0].address])
    story.hand_over(3, b)


@pytest.mark.usefixtures("always_old")
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("old_lives", [True, False])
def test_a_server_of_another_shape_may_take_the_name_over(
    stack: contextlib.ExitStack, before: int, after: int, old_lives: bool
) -> None:
    story = Story(stack, PATIENT, before)
    for room in range(before):
        story.hand_over(room, story.a, room % before)
    b = story.swap(after)
    if not old_lives:
        story.a.end()
    for room in range(10, 10 + after):
        story.hand_over(room, b, room % after)


def test_a_server_of_another_shape_is_found_by_its_link_that_was_lost(stack: contextlib.ExitStack) -> None:
    """Its memory is fresh and its rooms have not failed: only the lost link shows that it is gone."""
    story = Story(stack, PATIENT)
    story.hand_over(1, story.a)
    b = story.swap(2)
    story.a.end()
    until(lambda: not story.sources(3))
    for room in (3, 4):
        story.hand_over(room, b, room % 2)


def test_a_room_that_waits_for_a_server_goes_where_the_shape_of_the_new_one_says(stack: contextlib.ExitStack) -> None:
    """The room was going to group 1 of the old server, and the new one has no such group."""
    story = Story(stack, PATIENT, 2)
    for room in (0, 1):
        story.hand_over(room, story.a, room)
    story.a.end()
    until(lambda: not story.sources(3))
    with story.decode.receiver(story.name.address, 3, identity=PROMPT) as receiver:
        until(lambda: (story.name.address, 1) in story.decode._resolver._finding)
        b = story.swap(1)
        with b.managers[0].sender(3, identity=PROMPT) as sender:
            sender.send([2], stop=4, last=True)
            receiver.send_metadata([7], tokens=4)
            receiver.wait(WAIT_S)


@pytest.mark.usefixtures("always_old")
def test_a_directory_that_is_down_or_has_forgotten_its_ranks_ends_nothing_while_the_links_are_up(
    stack: contextlib.ExitStack,
) -> None:
    story = Story(stack, TIMES)
    story.hand_over(1, story.a)
    empty = stack.enter_context(KVBootstrapServer())
    story.name.target = empty.address  # as a directory that was restarted: its ranks register again within 10 s
    story.hand_over(2, story.a)
    empty.close()
    story.hand_over(3, story.a)


def test_a_room_whose_own_engine_gave_it_up_costs_no_question(stack: contextlib.ExitStack) -> None:
    story = Story(stack, PATIENT)
    story.hand_over(1, story.a)
    before = story.a.asked.times
    with story.decode.receiver(story.name.address, 2, identity=PROMPT) as receiver:
        receiver.abort("the client left")
        with pytest.raises(RoomFailed, match="the client left"):
            receiver.wait(WAIT_S)
    story.hand_over(3, story.a)
    assert story.a.asked.times == before


def test_a_thousand_rooms_ask_a_directory_that_is_gone_once_in_a_while(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is old enough to be renewed, and that fails: not every room tries it again."""
    story = Story(stack, PATIENT)
    story.hand_over(1, story.a)
    began = 0

    async def listed(address: str, **_: object) -> list[RankInfo]:
        nonlocal began
        began += 1
        raise LinkError("no server is there")

    monkeypatch.setattr(story.decode._resolver, "_listed", listed)
    now_s = story.decode.loop.call(lambda: asyncio.get_running_loop().time())
    memory = story.decode._resolver._memories[story.name.address]
    memory.asked_s = now_s - resolver.FRESH_S - 0.1
    peers = {tuple(story.sources(room)) for room in range(1000)}
    assert peers == {(story.a.managers[0].address,)}
    until(lambda: began > 0)
    assert began == 1

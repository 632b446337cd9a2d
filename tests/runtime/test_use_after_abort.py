"""Pages offered to an aborted room go to the next one, and the old source does not write a byte into them.

The processes are real, over every transport that runs between two of them. The orders are the hard ones: the old source
sends only after the next room has finished, or is stopped, so that it cannot even receive the abort.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import pytest

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, KVPoll, KVReceiver, RoomFailed, Timeouts
from kvroom.runtime.link import LinkLimits
from kvroom.transports import create, probe
from kvroom_lab.pools import TestPool

WAIT_S = 30.0
TIMES = Timeouts(bootstrap_s=30, waiting_s=30, stall_s=30, drain_s=0.3)
OLD, NEW, PAGE = 0xAA, 0xBB, 9  # the byte of the aborted room, that of the next rooms, and the page


class Way(NamedTuple):
    """A transport, and whether revoking a grant proves that no peer can write any longer."""

    name: str
    options: dict[str, Any]
    proves: bool

    def manager(self, pool: TestPool, **more: Any) -> KVManager:
        return KVManager(pool.layout, transport=create(self.name, **self.options), timeouts=TIMES, **more)


WAYS = [
    Way("tcp", {}, proves=True),
    Way("local", {"mode": "vm"}, proves=False),
    Way("local", {"mode": "shm"}, proves=False),
    Way("auto", {}, proves=False),
    Way("nixl", {}, proves=False),
    Way("mooncake", {"trusted_fabric": True}, proves=False),
]
each_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.skipif(bool(probe(way.name).missing), reason=f"{way.name} cannot run here"))
        for way in WAYS
    ],
    ids=["tcp", "local-vm", "local-shm", "auto", "nixl", "mooncake"],
)


def prefill(control: Connection, addr: str, way: Way) -> None:
    """Carry out each command and answer it: page 5 holds OLD bytes, page 6 NEW ones."""
    pool = TestPool(shared=True)
    pool.array[:] = NEW
    pool.array[:, :, 5] = OLD
    changed = threading.Event()
    with way.manager(pool, register_with=addr, on_change=changed.set) as manager:
        control.send("ready")
        senders = {}
        while True:
            ask, room, page = control.recv()
            answer = ""
            if ask == "open":
                senders[room] = manager.sender(room, identity=PROMPT)
            elif ask == "send":
                senders[room].send([page], stop=4, last=True)
            elif ask == "await offer":
                while senders[room].poll() is KVPoll.Bootstrapping:
                    changed.wait(WAIT_S)
                    changed.clear()
            elif ask == "end":
                answer = outcome(senders[room].wait)
                senders.pop(room).clear()
            control.send(answer)


def outcome(wait: Callable[[float], object]) -> str:
    try:
        wait(WAIT_S)
    except RoomFailed as failure:
        return str(failure)
    return "handed over"


class Prefill:
    """A prefill process with a directory of its own, which carries out the test's commands."""

    def __init__(self, way: Way, stack: contextlib.ExitStack) -> None:
        self.addr = stack.enter_context(KVBootstrapServer()).address
        context = multiprocessing.get_context("spawn")
        self.control, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=prefill, args=(theirs, self.addr, way), daemon=True)
        self.process.start()
        stack.callback(self._end)
        theirs.close()
        assert self.answer() == "ready"

    def ask(self, what: str, room: int, page: int = 0) -> str:
        self.control.send((what, room, page))
        return self.answer()

    def answer(self) -> str:
        assert self.control.poll(WAIT_S), "the prefill process does not answer"
        answer: str = self.control.recv()
        return answer

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop all of its threads during this block."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def _end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.control.close()


class Decode:
    """The decode side, in this process: one page, used by one room after another."""

    def __init__(self, way: Way, stack: contextlib.ExitStack, **options: Any) -> None:
        self.pool = TestPool(shared=True)
        stack.callback(self.pool.close)
        self.changed = threading.Event()
        self.manager = stack.enter_context(way.manager(self.pool, on_change=self.changed.set, **options))
        self.released: queue.Queue[tuple[int, ...]] = queue.Queue()

    def receive(self, source: Prefill, room: int, page: int = PAGE) -> KVReceiver:
        receiver = self.manager.receiver(source.addr, room, on_release=self.released.put, identity=PROMPT)
        receiver.send_metadata([page], tokens=4)
        return receiver

    def hand_over(self, source: Prefill, room: int, page: int = PAGE) -> None:
        """Hand over one room from opening to end, with NEW bytes."""
        source.ask("open", room)
        source.ask("send", room, 6)
        with self.receive(source, room, page) as receiver:
            receiver.wait(WAIT_S)
        assert source.ask("end", room) == "handed over"
        assert self.released.get(timeout=WAIT_S) == (page,)

    def until_quarantined(self) -> None:
        while self.manager.audit().quarantined_pages != 1:
            assert self.changed.wait(WAIT_S)
            self.changed.clear()

    def check_no_old_byte(self) -> None:
        assert (self.pool.array[:, :, PAGE] == NEW).all()
        assert not (self.pool.array == OLD).any()
        assert self.manager.wait_idle(WAIT_S)
        assert self.manager.audit() == Audit()


@each_way
def test_the_old_source_sends_after_the_next_room_has_finished(way: Way) -> None:
    with contextlib.ExitStack() as stack:
        source, decode = Prefill(way, stack), Decode(way, stack)
        source.ask("open", 1)
        old = decode.receive(source, 1)
        source.ask("await offer", 1)
        old.abort("the client went away")
        old.clear()
        assert decode.released.get(timeout=WAIT_S) == (PAGE,)
        decode.hand_over(source, 2)
        source.ask("send", 1, 5)
        assert "the client went away" in source.ask("end", 1)
        decode.hand_over(source, 3, page=10)  # lands after any byte that the old room might have started
        decode.check_no_old_byte()


@each_way
@pytest.mark.sampled("way", "heartbeat_s")
@pytest.mark.parametrize("heartbeat_s", [1.0, 60.0], ids=["link lost", "link kept"])
def test_the_old_source_is_stopped_and_cannot_hear_of_the_abort(way: Way, heartbeat_s: float) -> None:
    with contextlib.ExitStack() as stack:
        old_source, source = Prefill(way, stack), Prefill(way, stack)
        decode = Decode(way, stack, link_limits=LinkLimits(heartbeat_s=heartbeat_s))
        old_source.ask("open", 1)
        old = decode.receive(old_source, 1)
        old_source.ask("await offer", 1)
        with old_source.stopped():
            old_source.control.send(("send", 1, 5))  # it will do this as soon as it continues
            if heartbeat_s == 1.0:
                assert re.search(r"silent for [2-9]\.\d s", outcome(old.wait))
            else:
                old.abort("the client went away")
            old.clear()
            if way.proves:
                assert decode.released.get(timeout=WAIT_S) == (PAGE,)
                decode.hand_over(source, 2)
            else:
                decode.until_quarantined()
                assert decode.released.empty()
        if not way.proves:
            assert decode.released.get(timeout=WAIT_S) == (PAGE,)  # proven by the old source itself
            decode.hand_over(source, 2)
        old_source.answer()
        # Its early writes went into quarantined pages, so it may report success for the old room.
        ended = old_source.ask("end", 1)
        assert "room 1 failed" in ended or not way.proves
        decode.hand_over(old_source, 3, page=10)  # it can be used again, and nothing was restarted
        decode.check_no_old_byte()

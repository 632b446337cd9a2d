"""The look-up of a slow name delays only the callers that asked for that name."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time

import pytest

from kvroom.dialling.names import MAX_KNOWN, Names
from resolving import resolver

WAIT_S = 20.0


def slow_names(count: int) -> list[str]:
    return [f"slow-{number}.test" for number in range(count)]


def test_a_name_has_all_its_addresses_in_their_order() -> None:
    with resolver({"both.test": ("127.0.0.2", "127.0.0.1")}):
        found = Names().look_up("both.test", 8998).result(WAIT_S)
    assert [each.address for each in found] == [("127.0.0.2", 8998), ("127.0.0.1", 8998)]
    assert {each.kind for each in found} == {socket.SOCK_STREAM}


@pytest.mark.parametrize("host", ["unknown.invalid", "a\0b", "x" * 64 + ".test", ""])
def test_what_cannot_be_resolved_is_an_error_of_the_system(host: str) -> None:
    answer = Names().look_up(host or None, None if host else "no service")
    assert isinstance(answer.exception(WAIT_S), OSError)


def test_a_hundred_slow_names_hold_up_no_other() -> None:
    names, slow = Names(), slow_names(100)
    with resolver({"good.test": ["127.0.0.1"]}, slow) as asked:
        waiting = [names.look_up(host, 8998) for host in slow]
        asked.wait_asked(*slow)
        assert names.look_up("good.test", 8998).result(WAIT_S)[0].address == ("127.0.0.1", 8998)
        assert not any(answer.done() for answer in waiting)
    assert all(isinstance(answer.exception(WAIT_S), socket.gaierror) for answer in waiting)


def test_callers_of_one_name_share_a_lookup() -> None:
    names = Names()
    with resolver(slow=["slow.test"]) as asked:
        answers = {id(names.look_up("slow.test", 8998)) for _ in range(50)}
        asked.wait_asked("slow.test")
        assert len(answers) == 1
        assert asked.asked["slow.test"] == 1


def test_over_the_bound_a_strange_name_is_refused_and_a_known_one_is_not() -> None:
    names = Names(lookups=4, known_lookups=1)
    slow = slow_names(4)
    with resolver({"known.test": ["127.0.0.1"], "strange.test": ["127.0.0.1"]}, slow):
        names.look_up("known.test", 8998).result(WAIT_S)
        for host in slow:
            names.look_up(host, 8998)
        refused = names.look_up("strange.test", 8998).exception(WAIT_S)
        assert isinstance(refused, OSError)
        assert "4 other lookups are still running" in str(refused)
        assert names.look_up("known.test", 8998).result(WAIT_S)


def test_what_was_refused_is_looked_up_when_there_is_room_again() -> None:
    names = Names(lookups=1)
    with resolver({"good.test": ["127.0.0.1"]}, ["slow.test"]) as asked:
        slow = names.look_up("slow.test", 8998)
        assert names.look_up("good.test", 8998).exception(WAIT_S) is not None
        asked.release()
        assert slow.exception(WAIT_S) is not None
        assert names.look_up("good.test", 8998).result(WAIT_S)


def test_names_are_not_remembered_without_end() -> None:
    names = Names()
    with resolver({f"good-{number}.test": ["127.0.0.1"] for number in range(MAX_KNOWN + 10)}) as asked:
        for host in asked._addresses:
            names.look_up(host, 8998).result(WAIT_S)
    assert len(names._known) == MAX_KNOWN
    assert not names._running


def test_a_system_without_threads_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    names = Names()
    monkeypatch.setattr(threading.Thread, "start", start)
    assert "can't start new thread" in str(names.look_up("good.test", 8998).exception(WAIT_S))
    assert not names._running


FORKED = """
import os, socket, threading
from kvroom.dialling.names import NAMES
asked = threading.Event()
system = socket.getaddrinfo
def wait_for_ever(*question):
    asked.set()
    threading.Event().wait()
socket.getaddrinfo = wait_for_ever
NAMES.look_up("name.test", 1)
asked.wait()
pid = os.fork()
if pid == 0:
    socket.getaddrinfo = lambda host, *rest: system("127.0.0.1", *rest)
    found = NAMES.look_up("name.test", 1).result(20)
    os._exit(0 if found[0].address == ("127.0.0.1", 1) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_forked_process_does_not_wait_for_its_parents_lookups_and_no_exit_waits_for_one() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


def test_a_loop_that_no_longer_waits_costs_the_others_nothing() -> None:
    """A task is cancelled during its look-up; another event loop waits for the same name, and gets the answer."""
    names = Names()

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(names.look_up("slow.test", 8998)), 0.05)

    with resolver(slow=["slow.test"]) as asked:
        start_s = time.monotonic()
        asyncio.run(give_up())
        assert time.monotonic() - start_s < WAIT_S
        answer = names.look_up("slow.test", 8998)
        assert not answer.done()
        asked.release()
        assert isinstance(answer.exception(WAIT_S), socket.gaierror)

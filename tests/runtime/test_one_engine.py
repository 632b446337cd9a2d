"""One directory belongs to one prefill engine: a second is refused with an error on both sides, a restarted one is not.

This holds for every state of the old engine (alive, closed, killed, stopped), and wherever the new one listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from manager_helpers import TIMES, Pair

from kvroom import KVBootstrapServer, KVManager
from kvroom.bootstrap import client
from kvroom.bootstrap.directory import Directory, RankInfo
from kvroom.errors import BootstrapError
from kvroom.plan import Parallel, Place
from kvroom.runtime import resolver
from kvroom.wire.address import parse_address
from kvroom_lab.pools import TestPool

WAIT_S = 20.0
SOON_S = 5.0
"""A limit well within a lease, on a busy machine."""

PREFILL = textwrap.dedent(
    """
    import sys
    from kvroom import KVManager
    from kvroom_lab.pools import TestPool

    manager = KVManager(TestPool().layout, transport="memory", register_with=sys.argv[1], port=int(sys.argv[2]))
    print(manager.address, flush=True)
    sys.stdin.read()
    manager.close()
    """
)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


class Heard(logging.Handler):
    """Collects the warnings of the resolver, each as an event."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.news = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.news.set()


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    resolver.logger.addHandler(handler)
    yield handler
    resolver.logger.removeHandler(handler)


def prefill(stack: contextlib.ExitStack, directory: str, port: int = 0, tp: int = 1, rank: int = 0) -> KVManager:
    pool = TestPool()
    stack.callback(pool.close)
    manager = KVManager(
        pool.layout,
        transport="memory",
        register_with=directory,
        port=port,
        parallel=Parallel(tp=tp, kv_heads=tp),
        place=Place(0, 0, rank, 0),
    )
    return stack.enter_context(manager)


@contextlib.contextmanager
def prefill_process(directory: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a prefill rank in a process of its own; yield its address. It is killed at the end."""
    command = [sys.executable, "-c", PREFILL, directory, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def listed(directory: str) -> list[str]:
    return [rank.address for rank in asyncio.run(client.listed(directory))]


def test_a_second_engine_is_an_error_on_both_sides_and_the_first_serves_on(
    stack: contextlib.ExitStack, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "RANK_TTL_S", 0.3)  # so that it refreshes ten times a second
    pair = Pair("memory", stack)
    first = pair.prefill.address
    with pytest.raises(BootstrapError) as refused:
        prefill(stack, pair.addr)
    assert f"at {first}, which is alive: one directory serves one prefill engine; stop that engine, or" in str(
        refused.value
    )
    assert heard.news.wait(WAIT_S)
    assert heard.messages[0].startswith("another prefill engine, at 127.0.0.1:")
    assert f"was refused by the directory at {pair.addr}: a directory serves one prefill" in heard.messages[0]
    assert listed(pair.addr) == [first]
    pair.check_clean()


def test_an_engine_of_another_shape_is_refused_too(stack: contextlib.ExitStack) -> None:
    directory = stack.enter_context(KVBootstrapServer())
    first = prefill(stack, directory.address, tp=2, rank=0)
    with pytest.raises(BootstrapError, match=f"at {first.address}, which is alive: one directory"):
        prefill(stack, directory.address, tp=4, rank=0)
    with pytest.raises(BootstrapError, match=rf"{first.address}.*attn_tp_size 4 \(not 2\).*start all"):
        prefill(stack, directory.address, tp=4, rank=3)
    prefill(stack, directory.address, tp=2, rank=1)
    assert len(listed(directory.address)) == 2


def test_an_engine_that_was_closed_has_left_the_directory(stack: contextlib.ExitStack) -> None:
    directory = stack.enter_context(KVBootstrapServer())
    prefill(stack, directory.address).close()
    assert listed(directory.address) == []
    second = prefill(stack, directory.address, tp=2)
    assert listed(directory.address) == [second.address]


@pytest.mark.parametrize("same_port", [True, False])
def test_an_engine_that_was_killed_comes_back_within_its_lease(stack: contextlib.ExitStack, same_port: bool) -> None:
    directory = stack.enter_context(KVBootstrapServer())
    with prefill_process(directory.address) as (process, address):
        process.kill()
        process.wait(WAIT_S)
        assert listed(directory.address) == [address]
        began_s = time.monotonic()
        again = prefill(stack, directory.address, parse_address(address).port if same_port else 0)
        assert time.monotonic() - began_s < SOON_S
        assert (again.address == address) is same_port
        assert listed(directory.address) == [again.address]


def test_an_engine_that_is_stopped_keeps_its_place_until_its_lease_ends(
    stack: contextlib.ExitStack, heard: Heard
) -> None:
    lease_s = 2.0
    directory = stack.enter_context(KVBootstrapServer(directory=Directory(rank_ttl_s=lease_s)))
    with prefill_process(directory.address) as (process, address):
        os.kill(process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        with ThreadPoolExecutor(1) as thread:
            starting = thread.submit(prefill, stack, directory.address)
            assert heard.news.wait(WAIT_S)
            assert f"registered by {address}, which does not answer: " in heard.messages[0]
            assert "when its lease ends, in" in heard.messages[0]
            assert listed(directory.address) == [address]
            again = starting.result(WAIT_S)
        assert time.monotonic() - began_s < lease_s + SOON_S
        assert listed(directory.address) == [again.address]
        assert len(heard.messages) == 1
        # When it continues, it has lost its place, and its registration is refused.
        os.kill(process.pid, signal.SIGCONT)
        old = RankInfo(rank_ip="127.0.0.1", rank_port=parse_address(address).port, page_size=4)
        with pytest.raises(BootstrapError, match=f"at {again.address}, which is alive"):
            asyncio.run(client.register(directory.address, old))


def test_a_newcomer_does_not_wait_longer_than_a_lease_and_says_why(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "RANK_TTL_S", 0.2)
    monkeypatch.setattr(resolver, "TIMEOUT_S", 0.1)
    directory = stack.enter_context(KVBootstrapServer())
    silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = silent.getsockname()[1]
    asyncio.run(client.register(directory.address, RankInfo(rank_ip="127.0.0.1", rank_port=port, page_size=4)))
    with pytest.raises(BootstrapError, match=f"registered by 127.0.0.1:{port}, which does not answer"):
        prefill(stack, directory.address)


def test_closing_does_not_wait_for_a_directory_that_is_gone(stack: contextlib.ExitStack) -> None:
    directory = KVBootstrapServer()
    directory.start()
    manager = prefill(stack, directory.address)
    directory.close()
    began_s = time.monotonic()
    manager.close()
    assert time.monotonic() - began_s < SOON_S


def test_two_engines_at_two_directories_are_none_of_each_other_s_business(stack: contextlib.ExitStack) -> None:
    pairs = [Pair("memory", stack, timeouts=TIMES) for _ in range(2)]
    for pair in pairs:
        pair.check_clean()

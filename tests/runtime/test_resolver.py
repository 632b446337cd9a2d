"""A prefill side that is silent: every caller that waits for it gets an error that names it, in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, RoomFailed, Timeouts
from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RankInfo
from kvroom_lab.pools import TestPool


def test_a_rank_that_never_answers_is_named_before_the_deadline_of_the_room() -> None:
    pool = TestPool()
    with contextlib.ExitStack() as stack:
        stack.callback(pool.close)
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # connections wait in its backlog
        directory = stack.enter_context(KVBootstrapServer())
        port = silent.getsockname()[1]
        rank = RankInfo(rank_ip="127.0.0.1", rank_port=port, page_size=pool.layout.page_tokens)
        asyncio.run(client.register(directory.address, rank))
        manager = stack.enter_context(KVManager(pool.layout, transport="tcp", timeouts=Timeouts(bootstrap_s=1)))
        receiver = stack.enter_context(manager.receiver(directory.address, 7, identity=PROMPT))
        with pytest.raises(RoomFailed, match=rf"timed out after 0.9 s: .*{directory.address}"):
            receiver.wait(20)


def test_a_directory_that_never_answers_is_named_before_the_deadline_of_the_room() -> None:
    pool = TestPool()
    with contextlib.ExitStack() as stack:
        stack.callback(pool.close)
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        addr = f"127.0.0.1:{silent.getsockname()[1]}"
        manager = stack.enter_context(KVManager(pool.layout, transport="tcp", timeouts=Timeouts(bootstrap_s=1)))
        receiver = stack.enter_context(manager.receiver(addr, 7, identity=PROMPT))
        with pytest.raises(RoomFailed, match=rf"timed out after 0.9 s: .*{addr}"):
            receiver.wait(20)

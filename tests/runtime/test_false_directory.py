"""A client names the directory of its room. One without the secret cannot make a manager connect anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, RoomFailed
from kvroom.bootstrap import client
from kvroom.bootstrap.directory import RankInfo
from kvroom.errors import BootstrapError
from kvroom.runtime.routing import Routing
from kvroom_lab.pools import TestPool

SECRET = b"a secret that is long enough"


def lists(directory: str, relay: socket.socket, **more: object) -> None:
    """Let a directory without a secret list a relay as its prefill server."""
    host, port = relay.getsockname()
    rank = RankInfo(rank_ip=host, rank_port=port, page_size=16, **more)  # type: ignore[arg-type]
    asyncio.run(client.register(directory, rank))


@pytest.mark.parametrize("load_balance_method", ["follow_bootstrap_room", "round_robin"])
def test_a_relay_that_a_false_directory_lists_is_never_dialled(load_balance_method: str) -> None:
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        relay.setblocking(False)
        false = stack.enter_context(KVBootstrapServer()).address
        lists(false, relay, load_balance_method=load_balance_method)
        pool = TestPool()
        stack.callback(pool.close)
        manager = stack.enter_context(KVManager(pool.layout, transport="tcp", secret=SECRET))
        with manager.receiver(false, 7, identity=PROMPT) as receiver, pytest.raises(RoomFailed) as failed:
            receiver.wait(20)
        assert f"ignored the answer of bootstrap directory {false} to GET /route" in str(failed.value)
        assert "give it and this worker the same secret" in str(failed.value)
        with pytest.raises(BlockingIOError):
            relay.accept()
        assert manager.audit().empty


def test_a_false_directory_routes_no_room() -> None:
    """The long poll of the routing: the rank that it names would choose among a real server's groups."""

    async def body() -> None:
        async with KVBootstrapServer() as false:
            rank = RankInfo(rank_ip="127.0.0.1", rank_port=1, page_size=16, attn_dp_size=2, load_balance_method="x")
            await client.register_dp_rank(false.address, 7, 1)
            routing = Routing(SECRET, 5.0)
            try:
                with pytest.raises(BootstrapError, match=r"ignored the answer of .* to POST /query_dp_ranks"):
                    await routing.dp_rank(false.address, rank.server, 7, 5.0)
            finally:
                await routing.close()

    asyncio.run(body())

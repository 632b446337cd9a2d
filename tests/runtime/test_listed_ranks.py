"""The ranks that a directory lists decide where a decode rank connects: an impossible list opens no connection."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from answering import directory

from identities import PROMPT
from kvroom import KVManager, RoomFailed, Timeouts
from kvroom.plan import Parallel
from kvroom.runtime.resolver import MAX_SOURCES, MAX_TOLD, RETRY_S
from kvroom_lab.pools import TestPool

Ranks = list[dict[str, Any]]


class Victim:
    """Servers at `count` ports that accept every connection and close it; `connections` counts them."""

    def __init__(self, count: int) -> None:
        self.connections = 0
        self._selector = selectors.DefaultSelector()
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        self.ports = [server.getsockname()[1] for server in self._sockets]
        self._wake, self._woken = socket.socketpair()
        for each in (*self._sockets, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.accept()[0].close()
                self.connections += 1

    def close(self) -> None:
        self._wake.close()
        self._thread.join()
        self._selector.close()
        for each in (self._woken, *self._sockets):
            each.close()


def rank(port: int, **fields: Any) -> dict[str, Any]:
    return {"rank_ip": "127.0.0.1", "rank_port": port, "page_size": 4, **fields}


def outcome(ranks: Ranks, bootstrap_s: float = 20) -> str:
    """Return why a room fails whose directory lists these ranks."""
    pool = TestPool()
    timeouts = Timeouts(bootstrap_s=bootstrap_s)
    with contextlib.ExitStack() as stack:
        stack.callback(pool.close)
        addr = stack.enter_context(directory(json.dumps({"ranks": ranks}).encode()))
        manager = stack.enter_context(KVManager(pool.layout, transport="tcp", timeouts=timeouts, parallel=Parallel()))
        receiver = stack.enter_context(manager.receiver(addr, 7, identity=PROMPT))
        with pytest.raises(RoomFailed) as caught:
            receiver.wait(20)
    return str(caught.value)


@pytest.fixture
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    made = Victim(getattr(request, "param", 2))
    yield made
    made.close()


def team(victim: Victim) -> Ranks:
    """Return one tensor rank of a server for each port of the victim."""
    size = len(victim.ports)
    return [rank(port, attn_tp_rank=n, attn_tp_size=size) for n, port in enumerate(victim.ports)]


IMPOSSIBLE: dict[str, tuple[Callable[[int], Ranks], str]] = {
    "more than described": (
        lambda port: [rank(port + n % 2, attn_tp_rank=n % 2, attn_tp_size=2) for n in range(3000)],
        "lists 3000 prefill ranks, but they describe a server of 2 (dp 1 x cp 1 x tp 2 x pp 1)",
    ),
    "more than a directory holds": (
        lambda port: [
            rank(port, attn_dp_rank=n // 1024, attn_dp_size=5, attn_tp_rank=n % 1024, attn_tp_size=1024)
            for n in range(5 * 1024)
        ],
        "lists 5120 prefill ranks, but they describe a server of 5120",
    ),
    "one place twice": (
        lambda port: [rank(port + n, attn_tp_rank=0, attn_tp_size=2) for n in range(2)],
        "lists 2 prefill ranks at only 1 places",
    ),
    "two servers": (
        lambda port: [rank(port, attn_tp_size=2), rank(port + 1, attn_tp_rank=1, attn_tp_size=2, pp_size=8)],
        "lists 2 prefill ranks that contradict each other: the rank at dp 0, cp 0, tp 1, pp 0 has pp_size 8 (not 1)",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_list_that_cannot_be_opens_no_connection_and_is_named_with_its_count(case: str, victim: Victim) -> None:
    make, says = IMPOSSIBLE[case]
    assert says in outcome(make(victim.ports[0]))
    assert victim.connections == 0


def test_ranks_that_share_an_address_are_waited_for_and_not_connected_to(victim: Victim) -> None:
    listed = [rank(victim.ports[0], attn_tp_rank=n, attn_tp_size=128) for n in range(128)]
    assert "lists 128 prefill ranks at only 1 addresses" in outcome(listed, bootstrap_s=2)
    assert victim.connections == 0


@pytest.mark.parametrize("victim", [MAX_SOURCES + 1], indirect=True)
def test_too_many_ranks_for_one_room_are_named_and_only_some_are_told(victim: Victim) -> None:
    says = f"a room of this rank would need links with {MAX_SOURCES + 1} prefill ranks, and the limit is {MAX_SOURCES}"
    assert says in outcome(team(victim))
    assert victim.connections <= MAX_TOLD


@pytest.mark.parametrize("victim", [200], indirect=True)
def test_ranks_that_are_none_cost_one_connection_a_try(victim: Victim) -> None:
    """Each try ends at the first rank. Afterwards some listed ranks are informed of the failure, once."""
    bootstrap_s = 2
    outcome(team(victim), bootstrap_s)
    assert 1 <= victim.connections <= bootstrap_s / RETRY_S + MAX_TOLD


def test_a_prefill_rank_at_its_own_loopback_address_is_named_with_the_remedy() -> None:
    """The directory on another machine lists the rank's own statement: an address that means this machine here."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    said = outcome([rank(port)], bootstrap_s=2)
    assert f"cannot connect to 127.0.0.1:{port}: connection refused" in said
    assert "a worker on another machine must be started with --host or --advertise-host" in said

"""Silent and slow clients at an HTTP port keep no other client out, and their connections are closed after a time."""

from __future__ import annotations

import contextlib
import http.client
import resource
import select
import socket
from collections.abc import Iterator

import pytest

from kvroom import KVBootstrapServer, KVManager, KVSender
from kvroom.bootstrap import connections
from kvroom.status.server import StatusServer
from kvroom.wire.address import parse_address
from kvroom_lab.pools import TestPool

WAIT_S = 20.0
MOST = connections.MIN_CONNECTIONS
HALVES = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"PUT /route HTTP/1.1\r\nHost: x\r\nX-Half", id="half a head"),
    pytest.param(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", id="half a body"),
]


@pytest.fixture(params=["directory", "status"])
def port(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of an HTTP server in this process."""
    if request.param == "directory":
        with KVBootstrapServer() as server:
            yield server.address
        return
    pool = TestPool()
    with KVManager(pool.layout) as manager, StatusServer(manager) as status:
        yield status.address
    pool.close()


def health(address: str) -> int:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=WAIT_S)) as client:
        client.request("GET", "/health")
        response = client.getresponse()
        assert response.getheader("Retry-After") == ("1" if response.status == 503 else None)
        return response.status


def ended(connection: socket.socket) -> bool:
    """Read until the server closes the connection."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the descriptors, so that `MOST` connections are half of them, and set long timeouts."""
    monkeypatch.setattr(connections, "REQUEST_S", 10 * WAIT_S)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2 * MOST, 2 * MOST))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("half", HALVES)
def test_silent_clients_keep_no_other_out(port: str, half: bytes) -> None:
    """The oldest one is closed for each new client."""
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(3 * MOST):
            silent.append(stack.enter_context(socket.create_connection(parse_address(port), WAIT_S)))
            with contextlib.suppress(ConnectionError):
                silent[-1].sendall(half)
        assert health(port) == 200
        assert all(ended(connection) for connection in silent[:MOST])


@pytest.mark.usefixtures("few")
def test_clients_that_keep_a_connection_keep_no_other_out(port: str) -> None:
    """They have got their responses, and one that is idle is closed for a new client."""
    kept: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MOST):
            client = stack.enter_context(contextlib.closing(http.client.HTTPConnection(port, timeout=WAIT_S)))
            client.request("GET", "/health")
            assert client.getresponse().read()
            assert client.sock is not None
            kept.append(client.sock)
        while len(kept) > MOST:
            ended_now = select.select(kept, [], [], WAIT_S)[0]
            assert ended_now, f"{len(kept)} connections are open"
            kept = [one for one in kept if one not in ended_now]


@pytest.mark.sampled("port", "half")
@pytest.mark.parametrize("half", HALVES)
def test_a_request_that_does_not_come_in_whole_ends_its_connection(
    port: str, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)
    with socket.create_connection(parse_address(port), WAIT_S) as slow:
        slow.sendall(half)
        assert ended(slow)
    assert health(port) == 200


@pytest.fixture
def status() -> Iterator[tuple[str, KVSender]]:
    """Yield the address of a manager's status server and the only room of that manager."""
    pool = TestPool()
    with KVManager(pool.layout) as manager, StatusServer(manager) as server, manager.sender(7) as sender:
        yield server.address, sender
    pool.close()


def begin(stack: contextlib.ExitStack, address: str) -> http.client.HTTPConnection:
    """Send a request for a phase that the room has not reached, and return when the server has the request."""
    client = stack.enter_context(contextlib.closing(http.client.HTTPConnection(address, timeout=WAIT_S)))
    client.request("GET", "/rooms?idle_within_s=60")
    assert health(address) == 200  # this request came later, and was answered
    return client


@pytest.mark.usefixtures("few")
def test_a_client_that_waits_for_its_answer_is_not_cut(
    status: tuple[str, KVSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the time limit of requests nor many later clients cut it off."""
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)  # the limit is for reading the request, not for its response
    address, sender = status
    with contextlib.ExitStack() as stack:
        waiting = begin(stack, address)
        where = parse_address(address)
        silent = [stack.enter_context(socket.create_connection(where, WAIT_S)) for _ in range(2 * MOST)]
        assert all(ended(connection) for connection in silent)
        sender.clear()
        assert waiting.getresponse().status == 200


def test_where_all_are_busy_a_client_is_told_to_come_later(
    status: tuple[str, KVSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, sender = status
    with contextlib.ExitStack() as stack:
        waiting = [begin(stack, address) for _ in range(MOST)]
        monkeypatch.setattr(resource, "getrlimit", lambda _: (0, 0))
        assert health(address) == 503
        sender.clear()
        assert [one.getresponse().status for one in waiting] == [200] * MOST

"""A server listens at every address of its host, with one port, and is reached at each of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import queue
import socket
from collections.abc import Iterator

import pytest

from kvroom.dialling.dial import dial
from kvroom.listening.acceptor import listen
from kvroom.listening.sockets import bound_sockets
from kvroom.listening.threads import AcceptThread
from kvroom.wire.address import HostPort
from resolving import BOTH, needs_ipv6, resolver

WAIT_S = 20.0
FAR = "198.51.100.7"
"""An address that no machine has (RFC 5737)."""


@contextlib.contextmanager
def listening(host: str, port: int = 0) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(sock) for sock in bound_sockets(HostPort(host, port))]
        for sock in found:
            sock.listen()
        yield found


def addresses(found: list[socket.socket]) -> list[str]:
    return [HostPort.of_socket(sock.getsockname()).host for sock in found]


def is_reached(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), dial(HostPort(host, port), WAIT_S):
        return True
    return False


@pytest.mark.parametrize(
    ("given", "at"),
    [
        (("127.0.0.2", "127.0.0.1"), ["127.0.0.2", "127.0.0.1"]),
        ((FAR, "127.0.0.1"), ["127.0.0.1"]),
        (("127.0.0.1", FAR, "127.0.0.1"), ["127.0.0.1"]),
    ],
)
def test_each_address_of_this_machine_is_bound_once(given: tuple[str, ...], at: list[str]) -> None:
    with resolver({"many.test": given}), listening("many.test") as found:
        assert addresses(found) == at
        assert len({sock.getsockname()[1] for sock in found}) == 1


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("both.test", [True, True]),
        ("::", [True, True]),
        ("", [True, True]),
        ("0.0.0.0", [False, True]),
        ("::1", [True, False]),
        ("127.0.0.1", [False, True]),
    ],
)
def test_a_server_is_reached_in_the_families_of_its_host(host: str, reached: list[bool]) -> None:
    with resolver({"both.test": BOTH}), listening(host) as found:
        port = found[0].getsockname()[1]
        assert [is_reached(address, port) for address in BOTH] == reached


def test_a_name_without_an_address_of_this_machine_is_an_error() -> None:
    with resolver({"far.test": [FAR]}), pytest.raises(OSError) as caught:
        bound_sockets(HostPort("far.test", 0))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_port_in_use_at_one_address_is_an_error_and_leaves_nothing_bound() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken, resolver({"many.test": ("127.0.0.1", "127.0.0.2")}):
        port = taken.getsockname()[1]
        with pytest.raises(OSError) as caught:
            bound_sockets(HostPort("many.test", port))
        assert caught.value.errno == errno.EADDRINUSE
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_any_free_port_is_one_that_is_free_at_every_address() -> None:
    """The first free port is in use at the second address, so another one is tried."""
    tried: list[int] = []
    with contextlib.ExitStack() as stack, resolver({"many.test": ("127.0.0.1", "127.0.0.2")}):

        def prepare(sock: socket.socket) -> None:
            if len(tried) == 1:  # the first address is bound; the second one follows
                (found,) = (s for s in held if s.fileno() != -1)
                stack.enter_context(socket.create_server(("127.0.0.2", found.getsockname()[1])))
            tried.append(sock.fileno())
            held.append(sock)

        held: list[socket.socket] = []
        found = bound_sockets(HostPort("many.test", 0), prepare)
        for sock in found:
            stack.enter_context(sock)
        assert len(tried) == 4
        assert len({sock.getsockname()[1] for sock in found}) == 1


@needs_ipv6
def test_an_asyncio_server_is_reached_at_each_address_of_its_name() -> None:
    async def body() -> None:
        acceptor = await listen(asyncio.Protocol, HostPort("both.test", 0), refusal=lambda _: b"")
        acceptor.start()
        for host in ("both.test", *BOTH):
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, acceptor.port)
            transport.close()
        await acceptor.close()

    with resolver({"both.test": BOTH}):
        asyncio.run(body())


@needs_ipv6
def test_a_thread_takes_connections_of_all_its_sockets() -> None:
    taken: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    with resolver({"both.test": BOTH}), listening("both.test") as found:
        thread = AcceptThread(found, "test-accept", taken.put)
        try:
            for host in BOTH * 2:
                with (
                    dial(HostPort(host, found[0].getsockname()[1]), WAIT_S) as client,
                    taken.get(timeout=WAIT_S) as here,
                ):
                    assert here.getsockname()[0] == host
                    assert here.getblocking()
                    client.sendall(b"x")
                    assert here.recv(1) == b"x"
        finally:
            thread.close()
        assert all(sock.fileno() == -1 for sock in found)

"""Every server of kvroom that runs on an asyncio loop, closed while connections arrive.

A connection takes three turns of the loop to reach its protocol. Each case closes a server a given number of turns
after clients have connected, so that the close meets every point in between: connections in the backlog, accepted, with
a transport, and known to their protocol.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from link_helpers import SECRET, Recorder, linked

import kvroom
from kvroom import KVBootstrapServer, KVManager
from kvroom.bootstrap.site import http_site
from kvroom.errors import ConfigurationError
from kvroom.listening.acceptor import listen
from kvroom.runtime.link import Links
from kvroom.status.server import StatusServer
from kvroom.wire.address import HostPort, parse_address
from kvroom_lab.pools import TestPool

WAIT_S = 20.0
TURNS = range(7)
CLIENTS = 3
SOURCE = Path(kvroom.__file__).parent
LISTENING = {
    "create_server",
    "create_unix_server",
    "start_server",
    "start_unix_server",
    "TCPSite",
    "SockSite",
    "UnixSite",
    "run_app",
    "serve_forever",
}
"""The calls that make a server of asyncio or aiohttp, which would lose connections while it closes."""

Serve = Callable[[], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def links() -> AsyncIterator[str]:
    async with linked() as (one, _):
        yield one.me.address


@asynccontextmanager
async def directory() -> AsyncIterator[str]:
    async with KVBootstrapServer() as server:
        yield server.address


@asynccontextmanager
async def status() -> AsyncIterator[str]:
    """Run the server that `StatusServer` runs in its thread; yield its address."""
    with closing(TestPool()) as pool, KVManager(pool.layout, transport="memory") as manager:
        async with StatusServer(manager)._serving() as address:
            yield address


@asynccontextmanager
async def worker_site() -> AsyncIterator[str]:
    """Serve as the workers of `kvroom.serve` do: on a socket that was bound before."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with http_site(web.Application(), [bound], shutdown_s=0.1) as port:
            yield f"127.0.0.1:{port}"
        assert bound.fileno() == -1


SERVERS: list[Serve] = [links, directory, status, worker_site]


def dial(stack: ExitStack, address: str) -> socket.socket:
    client = stack.enter_context(socket.create_connection(parse_address(address)))
    client.settimeout(WAIT_S)
    return client


def heard_end(client: socket.socket) -> bool:
    """Read to the end of the connection, whatever ends it. Raise `TimeoutError` if it stays open."""
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


def open_at(port: int) -> list[asyncio.Transport]:
    """Return the transports of this process whose own port this is, and which still have their socket."""
    # By type alone: `isinstance` reads `__class__`, and some objects of torch then emit a warning.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), asyncio.Transport)]
    sockets = [(transport, transport.get_extra_info("socket")) for transport in found]
    return [t for t, sock in sockets if sock is not None and sock.fileno() != -1 and sock.getsockname()[1] == port]


def run(body: Callable[[], Any]) -> list[str]:
    """Run the coroutine on a loop that ends in the same turn, and return everything that was left unclosed."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(body())
        finally:
            loop.close()
        gc.collect()
    return [str(one.message) for one in warned]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("serve", SERVERS, ids=lambda serve: serve.__name__)
def test_a_connection_that_comes_while_a_server_closes_is_closed_with_it(serve: Serve, turns: int) -> None:
    clients: list[socket.socket] = []

    async def body() -> None:
        async with serve() as address:
            clients.extend(dial(stack, address) for _ in range(CLIENTS))
            for _ in range(turns):
                await asyncio.sleep(0)
        assert open_at(parse_address(address).port) == []

    with ExitStack() as stack:
        assert run(body) == []
        assert all(heard_end(client) for client in clients)
        assert len(clients) == CLIENTS


def nothing(why: str) -> bytes:
    return b""


@pytest.mark.parametrize("turns", TURNS)
def test_a_server_is_closed_after_all_that_it_accepted_have_come(turns: int) -> None:
    made: list[asyncio.BaseTransport] = []

    class Greeted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def body() -> None:
        acceptor = await listen(Greeted, HostPort("127.0.0.1", 0), refusal=nothing)
        for _ in range(CLIENTS):
            dial(stack, f"127.0.0.1:{acceptor.port}")
        acceptor.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        await acceptor.close()
        assert len(made) == len(open_at(acceptor.port)) == (CLIENTS if turns > 1 else 0)  # or in the backlog
        await acceptor.close()
        for transport in made:
            transport.close()
        await asyncio.sleep(0)

    with ExitStack() as stack:
        assert run(body) == []


def test_a_server_refuses_from_the_first_moment_and_is_closed_even_if_closing_is_cancelled() -> None:
    made: list[asyncio.BaseTransport] = []

    class Greeted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def body() -> None:
        acceptor = await listen(Greeted, HostPort("127.0.0.1", 0), refusal=nothing)
        acceptor.start()
        dial(stack, str(acceptor.address))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(acceptor.close())
        await asyncio.sleep(0)
        assert not closing.done()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(acceptor.address):
            pass
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        for transport in made:
            transport.close()
        await asyncio.sleep(0)
        assert open_at(acceptor.port) == []

    with ExitStack() as stack:
        assert run(body) == []


def test_links_that_are_closed_twice_at_a_time_leave_nothing() -> None:
    async def body() -> None:
        links = Links(Recorder(), identity=b"id", secret=SECRET)
        me = await links.start()
        dial(stack, me.address)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.gather(links.close(), links.close())
        assert open_at(parse_address(me.address).port) == []
        await links.close()

    with ExitStack() as stack:
        assert run(body) == []


def test_a_client_that_does_not_read_keeps_no_site_open() -> None:
    async def body() -> None:
        writing = asyncio.Event()

        async def much(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            writing.set()
            await response.write(bytes(32 << 20))
            return response

        app = web.Application()
        app.router.add_get("/", much)
        async with http_site(app, HostPort("127.0.0.1", 0), shutdown_s=0.05) as port:
            dial(stack, f"127.0.0.1:{port}").sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            await asyncio.wait_for(writing.wait(), WAIT_S)
        assert open_at(port) == []

    with ExitStack() as stack:
        assert run(body) == []


def test_a_site_that_cannot_listen_leaves_the_socket_to_its_owner() -> None:
    async def body() -> None:
        with socket.socket() as bound, socket.socket() as taken:
            for one in (bound, taken):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", 0))
            where = HostPort(*bound.getsockname())
            taken.bind(where)
            taken.listen()
            for tried in (where, [bound]):
                with pytest.raises(ConfigurationError, match=f"port {where.port} on 127.0.0.1 is in use"):
                    async with http_site(web.Application(), tried, shutdown_s=0.1):
                        pass
            assert bound.getsockname() == where

    assert run(body) == []


def test_every_asyncio_server_of_ours_is_one_of_those_that_are_tested_here() -> None:
    """A new server must listen as these do: with an `Acceptor`, and with a case above."""
    places, acceptors = set(), set()
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in LISTENING:
                blocking = isinstance(node.value, ast.Name) and node.value.id == "socket"
                if not blocking and "testing" not in path.parts:
                    places.add(place)
            elif isinstance(node, ast.ImportFrom) and node.module == "kvroom.listening.acceptor":
                acceptors.add(place)
    assert places == set()
    assert acceptors == {"bootstrap/site.py", "runtime/link.py"}

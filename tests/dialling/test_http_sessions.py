"""The HTTP client for kvroom's own servers connects directly, to any kind of address."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from kvroom.bootstrap.site import http_site
from kvroom.dialling.http import describe_http_error, http_session, request, target
from kvroom.errors import ConfigurationError
from kvroom.wire.address import HostPort
from resolving import BOTH, needs_ipv6, resolver

TIMEOUT = aiohttp.ClientTimeout(total=20)
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@asynccontextmanager
async def server(host: str) -> AsyncIterator[int]:
    """Serve a page with the address at which the client connected."""

    async def whoami(request: web.Request) -> web.Response:
        return web.Response(text=str(request.remote))

    app = web.Application()
    app.router.add_get("/", whoami)
    async with http_site(app, HostPort(host, 0), shutdown_s=1) as port:
        yield port


async def ask(host: str, port: int) -> str:
    async with http_session(TIMEOUT) as session, request(session, "GET", HostPort(host, port), "/") as response:
        return await response.text()


@pytest.mark.parametrize("no_proxy", ["", "unrelated.example"])
def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, no_proxy: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", no_proxy)

        async def body() -> None:
            async with server("127.0.0.1") as port:
                assert await ask("127.0.0.1", port) == "127.0.0.1"

        asyncio.run(body())
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@needs_ipv6
@pytest.mark.parametrize("at", BOTH)
def test_each_address_of_a_name_is_tried(at: str) -> None:
    async def body() -> None:
        async with server(at) as port:
            assert await ask("both.test", port) == at

    with resolver({"both.test": BOTH}):
        asyncio.run(body())


def test_a_slow_name_leaves_the_loops_own_threads_alone() -> None:
    """A hundred look-ups wait, while another name and another job for a thread are served."""
    slow = [f"slow-{number}.test" for number in range(100)]

    async def body() -> None:
        async with server("127.0.0.1") as port:
            waiting = [asyncio.create_task(ask(host, port)) for host in slow]
            await asyncio.to_thread(asked.wait_asked, *slow)
            assert await ask("good.test", port) == "127.0.0.1"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    with resolver({"good.test": ["127.0.0.1"]}, slow) as asked:
        asyncio.run(body())


@pytest.mark.parametrize(
    ("server", "path", "host", "asked"),
    [
        (HostPort("fe80::1%eth0", 80), "/rooms/%", "fe80::1%eth0", "/rooms/%25"),
        ("http://[fe80::1%25eth0]:80/pool%2F1", "/rooms", "fe80::1%eth0", "/pool%2F1/rooms"),
        ("http://[::1]:80/", "/", "::1", "/"),
        ("worker-3:80", "/rooms", "worker-3", "/rooms"),
    ],
)
def test_an_interface_reaches_the_system_as_it_stands(server: HostPort | str, path: str, host: str, asked: str) -> None:
    found = target(server, path)
    assert (found.raw_host, found.port, found.path_safe) == (host, 80, asked)


@pytest.mark.parametrize(
    "path", ["/rooms?oldest=1", "/rooms#1", "/a b", "//elsewhere:81/", "/\u00e4", "/%2e%2e/x", "/\r\nX: y"]
)
def test_no_path_bends_a_url(path: str) -> None:
    """For any text in the path, the request goes to this host and port and has exactly this path."""
    where = HostPort("worker-3", 80)
    for found in (target(where, path), URL(where.url(path), encoded=True)):
        assert (found.scheme, found.host, found.port) == ("http", "worker-3", 80)
        assert (found.raw_query_string, found.fragment) == ("", "")
        assert unquote(found.raw_path) == path
        assert str(found).isprintable()


@pytest.mark.parametrize("value", ["1&idle_within_s=30", "1#x", "a b", "1?y=2"])
def test_no_value_of_a_query_bends_a_url(value: str) -> None:
    found = target("http://worker-3:80/pool", "/rooms", {"oldest": value})
    assert dict(found.query) == {"oldest": value}
    assert (found.path, found.fragment) == ("/pool/rooms", "")


@pytest.mark.parametrize(
    "server", ["http://worker-3:80?a=b", "worker-3#", "http://me@worker-3:80", "http://a\\@b:80", "worker-3:80/a\x00b"]
)
def test_a_text_that_is_no_server_is_refused(server: str) -> None:
    with pytest.raises(ConfigurationError, match="write a URL"):
        target(server, "/rooms")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    """The server that the redirect names sees no connection, and so gets no header."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        location = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/route"

        async def redirect(_request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": location})

        async def body() -> None:
            app = web.Application()
            app.router.add_get("/route", redirect)
            async with http_site(app, HostPort("127.0.0.1", 0), shutdown_s=1) as port:
                headers = {"Authorization": "KVRoom 1:00"}
                where = HostPort("127.0.0.1", port)
                async with (
                    http_session(TIMEOUT) as session,
                    request(session, "GET", where, "/route", headers=headers) as response,
                ):
                    assert response.status == status

        asyncio.run(body())
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_no_cookie_of_a_server_is_sent_to_it_again() -> None:
    async def page(request_: web.Request) -> web.Response:
        seen.append(request_.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "a=b"})

    async def body() -> None:
        app = web.Application()
        app.router.add_get("/", page)
        async with http_site(app, HostPort("127.0.0.1", 0), shutdown_s=1) as port, http_session(TIMEOUT) as session:
            for _ in range(2):
                async with request(session, "GET", HostPort("localhost", port), "/") as response:
                    assert response.status == 200

    seen: list[str | None] = []
    asyncio.run(body())
    assert seen == [None, None]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH secret-banner\r\n", "its answer is not valid HTTP (ClientResponseError)"),
        (b"HTTP/1.1 200 OK\r\nX-secret-banner\r\n\r\n", "its answer is not valid HTTP (ClientResponseError)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nsecret-banner", "its answer is broken or incomplete"),
        (b"HTTP/1.1 200 OK\r\n", "connection lost before it answered"),
    ],
    ids=["banner", "header", "body", "half"],
)
def test_a_fault_is_told_without_a_byte_of_the_answer(answer: bytes, says: str) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def body() -> None:
        server = await asyncio.start_server(say, "127.0.0.1", 0)
        async with server:
            where = HostPort("127.0.0.1", server.sockets[0].getsockname()[1])
            async with http_session(TIMEOUT) as session:
                with pytest.raises(aiohttp.ClientError) as caught:
                    async with request(session, "GET", where, "/") as response:
                        await response.read()
        assert describe_http_error(caught.value) == says

    asyncio.run(body())

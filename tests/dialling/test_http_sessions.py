"""The client of our own servers goes to them directly, at whatever address they are."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from kvroom.bootstrap.site import http_site
from kvroom.dialling.http import http_session, target
from kvroom.wire.address import HostPort
from resolving import BOTH, needs_ipv6, resolver

TIMEOUT = aiohttp.ClientTimeout(total=20)
PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@asynccontextmanager
async def server(host: str) -> AsyncIterator[int]:
    """Serve a page that says by which address its client came."""

    async def whoami(request: web.Request) -> web.Response:
        return web.Response(text=str(request.remote))

    app = web.Application()
    app.router.add_get("/", whoami)
    async with http_site(app, HostPort(host, 0), shutdown_s=1) as port:
        yield port


async def ask(host: str, port: int) -> str:
    async with http_session(TIMEOUT) as session, session.get(target(HostPort(host, port).url("/"))) as response:
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
    """A hundred of them wait while another name, and something else that needs a thread, are answered."""
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
    ("url", "host", "path"),
    [
        ("http://[fe80::1%25eth0]:80/rooms/%25", "fe80::1%eth0", "/rooms/%"),
        ("http://[::1]:80/", "::1", "/"),
        ("http://worker-3:80", "worker-3", "/"),
    ],
)
def test_an_interface_reaches_the_system_as_it_stands(url: str, host: str, path: str) -> None:
    asked = target(url)
    assert (asked.raw_host, asked.path) == (host, path)

"""The HTTP client of everything that asks our own servers: directories, workers, routers, windows on rooms.

It goes to them directly. A proxy that the environment names (`http_proxy`, `all_proxy`, ...) is for what is outside: it
knows neither the loopback address nor the names of a cluster. Names are resolved as `kvroom.dialling.names` does, and
all their addresses are tried.

Three rules, because the address of a server may come from a client, and what answers there may be anything:

    A URL is built from its parts (`target`), never from one text: no host, path or query can bend it.
    No redirect is followed (`request`): what was meant for one server, a signed header above all, goes to no other.
    An error says what went wrong (`describe_http_error`) and quotes nothing. aiohttp's own texts hold what the server
    sent, and their `repr` holds our request with its headers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from kvroom.wire.address import HostPort, ServerURL, os_reason, read_server_url

from .allowed import AllowList
from .names import NAMES

Query = Mapping[str, str | int]


def http_session(timeout: aiohttp.ClientTimeout, allowed: AllowList | None = None) -> aiohttp.ClientSession:
    """Return a session of the running loop for servers of ours; close it. Its requests are made with `request`.

    Of a name that is looked up only `allowed` addresses are dialled (None: all); without one, a request raises
    `AddressNotAllowed`. A host that is an address is not looked up: the caller checks it.
    It keeps no cookies: our servers set none, and one that a stranger sets would travel in later requests.
    """
    connector = aiohttp.TCPConnector(resolver=_Resolver(allowed))
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    )


def target(server: HostPort | str, path: str, query: Query | None = None) -> URL:
    """Return the URL of `path` (with its slash, not escaped) on a server: an address, or a URL as `read_url` has it.

    Path and query are escaped. The host stands in it as the system takes it: the `%` of an interface unescaped.
    `ConfigurationError` for a text that is not the URL of a server.
    """
    base = ServerURL("http", *server) if isinstance(server, HostPort) else read_server_url(server)
    url = URL.build(scheme=base.scheme, host=base.host, port=base.port)
    # `safe`: what the operator's own path has escaped already stays as it is.
    url = url.with_path(quote(base.path, safe="/%:@!$&'()*+,;=~") + quote(path), encoded=True)
    return url.with_query(query) if query else url


@asynccontextmanager
async def request(
    session: aiohttp.ClientSession,
    method: str,
    server: HostPort | str,
    path: str,
    *,
    query: Query | None = None,
    **options: Any,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask a server of ours, and yield its response as it comes. `options` are aiohttp's.

    A redirect is an answer like any other and is not followed: its status is 3xx. Raises `aiohttp.ClientError`, to be
    told with `describe_http_error`, or `asyncio.TimeoutError`.
    """
    async with session.request(method, target(server, path, query), allow_redirects=False, **options) as response:
        yield response


def describe_http_error(error: aiohttp.ClientError) -> str:
    """Return why a server was not asked or gave no answer, to end a sentence. Holds nothing that was sent or came."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return os_reason(error.os_error)
    if isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError):
        return "connection lost before it answered"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "its answer is broken or incomplete"
    return f"it does not speak HTTP as expected ({type(error).__name__})"


class _Resolver(AbstractResolver):
    def __init__(self, allowed: AllowList | None) -> None:
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await asyncio.wrap_future(NAMES.look_up(host, port, family=family))
        if self._allowed is not None:
            found = self._allowed.among(HostPort.of(host, port), found)
        return [
            ResolveResult(
                hostname=host,
                host=HostPort.of_socket(each.address).host,
                port=port,
                family=each.family,
                proto=each.protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for each in found
        ]

    async def close(self) -> None:
        """Nothing is open."""

"""The HTTP client for kvroom's own servers: directories, workers, routers, views of rooms.

It connects to them directly and ignores a proxy in the environment (`http_proxy`, `all_proxy`, ...): such a proxy is
for hosts outside, and can neither reach this machine's loopback address nor resolve the names of a cluster. Names are
resolved by `kvroom.dialling.names`, and all their addresses are tried.

There are three rules, because the address of a server may come from a client, and any program may answer there:

    A URL is built from its parts (`target`), never from one text, so that no part can change its meaning.
    No redirect is followed (`request`): a request meant for one server, and above all its signed header, must not reach
    another.
    An error message states what went wrong (`describe_http_error`) and quotes nothing. aiohttp's own texts contain what
    the server sent, and their `repr` contains the request with its headers.
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
    """Return a session of the running loop for kvroom's servers. The caller closes it and uses `request` with it.

    It keeps no cookies: kvroom's servers set none, and a cookie that a stranger sets would travel in later requests.

    Args:
        timeout: The limits of each request.
        allowed: The addresses of a name that may be dialled; None for all. If none of a name's addresses is allowed, a
            request raises `AddressNotAllowed`. A host that is an address is not looked up; the caller must check it.
    """
    connector = aiohttp.TCPConnector(resolver=_Resolver(allowed))
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    )


def target(server: HostPort | str, path: str, query: Query | None = None) -> URL:
    """Return the URL of a path on a server.

    Args:
        server: The address or URL of the server.
        path: The path, with its leading slash and not escaped.
        query: The query, not escaped.

    Returns:
        The URL, with path and query escaped. The `%` before an interface in the host stays unescaped, as the system
        expects it.

    Raises:
        ConfigurationError: `server` is not the URL of a server.
    """
    base = ServerURL("http", *server) if isinstance(server, HostPort) else read_server_url(server)
    url = URL.build(scheme=base.scheme, host=base.host, port=base.port)
    # `safe` keeps the escapes in the operator's own path.
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
    """Send a request to one of kvroom's servers, and yield its response before the body is read.

    A redirect is not followed: it is a response with a status of 3xx. `options` are those of aiohttp.

    Raises:
        aiohttp.ClientError: The request failed; describe it with `describe_http_error`.
        asyncio.TimeoutError: The request timed out.
    """
    async with session.request(method, target(server, path, query), allow_redirects=False, **options) as response:
        yield response


def describe_http_error(error: aiohttp.ClientError) -> str:
    """Return the reason for which a request failed, as the end of a sentence, without anything sent or received."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return os_reason(error.os_error)
    if isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError):
        return "connection lost before it answered"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "its answer is broken or incomplete"
    return f"its answer is not valid HTTP ({type(error).__name__})"


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
        """Do nothing: the resolver holds no resources."""

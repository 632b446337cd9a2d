"""The HTTP client of everything that asks our own servers: directories, workers, routers, windows on rooms.

It goes to them directly. A proxy that the environment names (`http_proxy`, `all_proxy`, ...) is for what is outside: it
knows neither the loopback address nor the names of a cluster. Names are resolved as `kvroom.dialling.names` does, and
all their addresses are tried.
"""

from __future__ import annotations

import asyncio
import socket

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from kvroom.dialling.names import NAMES
from kvroom.wire.address import HostPort


def http_session(timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    """Return a session of the running loop for servers of ours; close it. It takes URLs as `target` makes them."""
    connector = aiohttp.TCPConnector(resolver=_Resolver())
    return aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)


def target(url: str) -> URL:
    """Return a URL for aiohttp, which hands the host to the system as it stands: the `%` of an interface unescaped."""
    scheme, found, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return URL(f"{scheme}{found}{authority.replace('%25', '%', 1)}{slash}{path}")


class _Resolver(AbstractResolver):
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await asyncio.wrap_future(NAMES.look_up(host, port, family=family))
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

"""An HTTP server for one manager, for engines that embed a manager and have no HTTP server of kvroom.

    GET /rooms, /rooms/{number}   the rooms, as `kvroom rooms` shows them (see `kvroom.status.rooms`)
    POST /fence                   declare that the lost peers at a host are gone (see `kvroom.status.rooms`)
    GET /metrics                  the metrics of the manager for Prometheus
    GET /health                   200 while the manager runs, 503 once it is closed

The only thing that a caller can change is to declare a lost peer to be gone. As at the admin address of kvroom's
workers, the rules of `kvroom.status.admin` apply: on loopback it answers processes of this machine, beyond loopback
callers that send the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType

from aiohttp import web

from kvroom.bootstrap.site import http_site
from kvroom.bootstrap.threads import ServerThread
from kvroom.errors import ConfigurationError
from kvroom.runtime.manager import KVManager
from kvroom.wire.address import (
    HostPort,
    check_port,
    listening_at,
    loopback_of,
    parse_address,
    read_listen_host,
)

from .admin import Admission
from .answers import error_body, error_response, errors_as_json
from .rooms import Extra, RoomsWindow

SHUTDOWN_S = 1.0
"""Time that open requests get to end when the server is closed."""


class StatusServer:
    """Serves the state of a manager in its own thread, from `start()` to `close()`, or in a `with` block.

    Close it before the manager, which it does not close.

    Args:
        manager: the manager.
        host: where to listen.
        port: where to listen; 0 takes any free port.
        token: the token that requests must carry; empty on loopback if none is required.
        extra: returns further counts, shown at the top level of each answer of `/rooms`.

    Raises:
        ConfigurationError: the host is beyond loopback and there is no token, or host or port is invalid.
    """

    def __init__(
        self,
        manager: KVManager,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: bytes = b"",
        extra: Extra = dict,
    ) -> None:
        self._admission = Admission(host, token)
        check_port(port, "showing rooms")
        self._manager = manager
        self._listen = HostPort(read_listen_host(host), port)
        self._window = RoomsWindow(manager, extra)
        self._address: str | None = None
        self._thread = ServerThread("kvroom-status", self._listen, self._serving)

    @property
    def address(self) -> str:
        """The `host:port` on which it listens. Raises `ConfigurationError` while it is not started."""
        if self._address is None:
            raise ConfigurationError("the status server has no address before it is started")
        return self._address

    @property
    def url(self) -> str:
        """The URL for `kvroom rooms` on this machine. Raises `ConfigurationError` while it is not started."""
        return HostPort(loopback_of(self._listen.host), parse_address(self.address).port).url()

    def start(self) -> str:
        """Start the thread, and return the address once the server accepts connections.

        Raises:
            ConfigurationError: the server runs already, or cannot listen on host and port; nothing is open then.
        """
        if self._thread.running:
            raise ConfigurationError(f"the status server is already running, on {self.address}")
        self._address = self._thread.start()
        return self._address

    def close(self) -> None:
        """Stop listening, end open requests, and end the thread. Blocks for a few seconds at most. Idempotent."""
        self._address = None
        self._thread.close()

    def __enter__(self) -> StatusServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[str]:
        async def health(_: web.Request) -> web.StreamResponse:
            try:
                await asyncio.to_thread(self._manager.metrics)
            except ConfigurationError as error:
                return error_response(503, str(error))
            return web.Response(text="ok")

        async def metrics(http: web.Request) -> web.StreamResponse:
            body, content_type = await asyncio.to_thread(self._page, http.headers.get("Accept", ""))
            return web.Response(body=body, headers={"Content-Type": content_type})

        app = web.Application(middlewares=[errors_as_json, self._admission.middleware()])
        app.add_routes([*self._window.routes(), web.get("/health", health), web.get("/metrics", metrics)])
        async with http_site(app, self._listen, shutdown_s=SHUTDOWN_S, error_body=partial(error_body, 503)) as port:
            yield listening_at(self._listen.host, port)

    def _page(self, accept: str) -> tuple[bytes, str]:
        try:
            from .metrics import MetricsPage, manager_families  # the library does without prometheus
        except ModuleNotFoundError as error:
            missing = f"/metrics needs prometheus-client ({error}): pip install prometheus-client"
            raise ConfigurationError(missing) from None
        return MetricsPage(lambda: manager_families(self._manager.metrics())).render(accept)

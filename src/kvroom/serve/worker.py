"""Start and end of a worker's parts: engine, bootstrap directory and HTTP sites, as context managers.

The HTTP sites end first: their handlers are cancelled, which aborts their rooms. Then follow the partner for probes,
the engine with its manager, which informs its peers, and last the directory.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvroom import KVBootstrapServer, KVManager, LinkLimits, Timeouts
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.loop import OpenManager
from kvroom.engine.options import EngineOptions
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.weights import LoadedModel
from kvroom.http import http_site
from kvroom.network import HostPort, loopback_of, parse_address
from kvroom.status import Admission, error_body

from .app import EngineServer, ModelCard
from .decode import DecodeServer
from .prefill import PrefillServer
from .probe import Ask, Probe, decode_partner, prefill_partner

BACKLOG = 1024
SHUTDOWN_S = 2.0
"""Seconds that open connections get to end before their handlers are cancelled."""


class ServedModel(NamedTuple):
    """A model and the directory that it came from."""

    model: LoadedModel
    path: Path


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker's manager and engine. With `advertise_host` None, peers reach the manager at `host`.

    Peers link at `link_port`; 0 takes a free one.
    `bootstrap_allow` lists the directories that requests may name; None means the default of `KVManager`.
    """

    host: str
    advertise_host: str | None
    link_port: int
    transport: str
    transport_options: Mapping[str, Any]
    trusted_fabric: bool
    bootstrap_allow: tuple[str, ...] | None
    secret: bytes = field(repr=False)
    timeouts: Timeouts
    link_limits: LinkLimits
    checksum: bool
    engine: EngineOptions


@dataclass(frozen=True)
class HttpPorts:
    """The bound HTTP sockets of a worker, for clients and for the operator. `admin_url` is the latter's public URL."""

    clients: Sequence[socket.socket]
    admin: Sequence[socket.socket]
    admin_url: str
    admission: Admission
    api_keys: Sequence[bytes] = field(repr=False)
    """Keys of clients. If there are none, clients need no key."""


@asynccontextmanager
async def prefill_worker(
    served: ServedModel, settings: WorkerSettings, http: HttpPorts, *, bootstrap_port: int
) -> AsyncIterator[int]:
    """Serve prefill on `http`. Yields the port of the bootstrap directory (a free one if 0 was given)."""
    async with KVBootstrapServer(settings.host, bootstrap_port, secret=settings.secret) as directory:
        port = parse_address(directory.address).port
        here = HostPort(loopback_of(settings.host), port)
        opening = _open_manager(settings, register_with=str(here))
        # In a thread, because the constructor blocks until the directory, which runs in this loop, has registered it.
        engine = await asyncio.to_thread(PrefillEngine, served.model, settings.engine, opening)
        try:
            partner = partial(decode_partner, engine, settings.engine, _open_manager(_nearby(settings)), str(here))
            async with Probe(engine, partner) as probe:
                server = PrefillServer(engine, card(served, settings.engine), probe)
                async with _sites(server, http):
                    yield port
        finally:
            await asyncio.to_thread(engine.close)


@asynccontextmanager
async def decode_worker(served: ServedModel, settings: WorkerSettings, http: HttpPorts) -> AsyncIterator[None]:
    """Serve decode on `http`."""
    engine = await asyncio.to_thread(DecodeEngine, served.model, settings.engine, _open_manager(settings))

    def partner() -> AbstractAsyncContextManager[Ask]:
        nearby = _nearby(settings)
        directory = KVBootstrapServer(nearby.host, secret=settings.secret)
        return prefill_partner(engine, settings.engine, partial(_open_manager, nearby), directory)

    try:
        async with Probe(engine, partner) as probe:
            server = DecodeServer(engine, card(served, settings.engine), probe)
            async with _sites(server, http):
                yield
    finally:
        await asyncio.to_thread(engine.close)


def _nearby(settings: WorkerSettings) -> WorkerSettings:
    """Return settings for a second manager, which is reachable from this host only.

    It takes free ports, because the worker's own manager and transport have the given ones.
    """
    options = {name: value for name, value in settings.transport_options.items() if name != "port"}
    return replace(
        settings, host=loopback_of(settings.host), advertise_host=None, link_port=0, transport_options=options
    )


@asynccontextmanager
async def _sites(server: EngineServer, http: HttpPorts) -> AsyncIterator[None]:
    """Serve both applications in this loop. The operator's starts first and ends last."""
    serve = partial(http_site, shutdown_s=SHUTDOWN_S, error_body=partial(error_body, 503))
    async with (
        serve(server.admin_application(http.admission), http.admin),
        serve(server.application(http.admin_url, http.api_keys), http.clients, backlog=BACKLOG),
    ):
        yield


def card(served: ServedModel, options: EngineOptions) -> ModelCard:
    """Return the worker's description of its model."""
    return ModelCard(
        name=served.model.name,
        path=str(served.path),
        room_tokens=min(served.model.max_tokens, options.pool_pages * options.page_tokens),
        max_running_requests=options.max_running,
    )


def _open_manager(settings: WorkerSettings, register_with: str | None = None) -> OpenManager:
    return partial(
        KVManager,
        host=settings.host,
        advertise_host=settings.advertise_host,
        port=settings.link_port,
        transport=settings.transport,
        transport_options=settings.transport_options,
        trusted_fabric=settings.trusted_fabric,
        bootstrap_allow=settings.bootstrap_allow,
        secret=settings.secret,
        timeouts=settings.timeouts,
        link_limits=settings.link_limits,
        checksum=settings.checksum,
        register_with=register_with,
    )

"""The life of a worker process's parts: engine, bootstrap directory and HTTP site, each a block that cleans up.

They end in the order that leaves nothing open: first the site (its handlers are cancelled, which aborts their rooms),
then the partner for probes, the engine with its manager (which tells its peers), then the directory.
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
"""How long open connections get to end by themselves before their handlers are cancelled."""


class ServedModel(NamedTuple):
    """A model and the directory that it came from."""

    model: LoadedModel
    path: Path


@dataclass(frozen=True)
class WorkerSettings:
    """Where a worker's manager listens and how it hands over. `advertise_host` None: peers reach it by `host`.

    `bootstrap_allow`: the directories that requests may name; None: the default of a `KVManager`.
    """

    host: str
    advertise_host: str | None
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
    """The HTTP of a worker: bound sockets for clients and for the operator, whose URL for others is `admin_url`."""

    clients: Sequence[socket.socket]
    admin: Sequence[socket.socket]
    admin_url: str
    admission: Admission
    api_keys: Sequence[bytes] = field(repr=False)
    """Of clients; empty: none is needed."""


@asynccontextmanager
async def prefill_worker(
    served: ServedModel, settings: WorkerSettings, http: HttpPorts, *, bootstrap_port: int
) -> AsyncIterator[int]:
    """Serve prefill on `http`; yields the port of the bootstrap directory (chosen if 0 was given)."""
    async with KVBootstrapServer(settings.host, bootstrap_port, secret=settings.secret) as directory:
        port = parse_address(directory.address).port
        here = HostPort(loopback_of(settings.host), port)
        opening = _open_manager(settings, register_with=str(here))
        # In a thread: it waits until the directory, which lives in this loop, has registered it.
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
    """The settings of a manager that only this process has to reach."""
    return replace(settings, host=loopback_of(settings.host), advertise_host=None)


@asynccontextmanager
async def _sites(server: EngineServer, http: HttpPorts) -> AsyncIterator[None]:
    """Both applications, in this loop. The operator's is there as long as the other one."""
    serve = partial(http_site, shutdown_s=SHUTDOWN_S, error_body=partial(error_body, 503))
    async with (
        serve(server.admin_application(http.admission), http.admin),
        serve(server.application(http.admin_url, http.api_keys), http.clients, backlog=BACKLOG),
    ):
        yield


def card(served: ServedModel, options: EngineOptions) -> ModelCard:
    """What the worker says about its model."""
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

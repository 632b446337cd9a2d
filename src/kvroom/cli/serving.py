"""What `kvroom prefill` and `kvroom decode` do once their settings are known to be right: load, serve, say so.

Importing this imports torch.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import NamedTuple

from kvroom import LinkLimits, Timeouts
from kvroom.cli.ports import port_of
from kvroom.cli.processes import Ready
from kvroom.cli.progress import Report
from kvroom.engine.options import EngineOptions
from kvroom.engine.weights import LoadedModel, find, load
from kvroom.network import HostPort, advertised_host, read_allowed
from kvroom.serve.worker import HttpPorts, WorkerSettings, decode_worker, prefill_worker


class Loaded(NamedTuple):
    """A model and the directory that it came from."""

    model: LoadedModel
    path: Path


def load_model(options: argparse.Namespace, report: Report) -> Loaded:
    """Find, if need be convert, and load `--model`. Raises `ConfigurationError`."""
    path = find(options.model, progress=report)
    model = load(
        options.model, dtype=options.dtype, device=options.device, name=options.served_model_name, progress=report
    )
    return Loaded(model, path)


async def serve(role: str, options: argparse.Namespace, loaded: Loaded, secret: bytes, http: HttpPorts) -> None:
    """Serve on the bound sockets until cancelled. The ready line on stdout comes when requests can."""
    settings = _settings(role, options, secret)
    where = HostPort.of(advertised_host(options.host, options.advertise_host), port_of(http.clients))
    facts = {"url": where.url(), "admin_url": http.admin_url, "model": loaded.model.name}
    if role == "prefill":
        async with prefill_worker(*loaded, settings, http, options.bootstrap_port) as bootstrap_port:
            await _until_cancelled(Ready(role, {**facts, "bootstrap_port": str(bootstrap_port)}))
    else:
        async with decode_worker(*loaded, settings, http):
            await _until_cancelled(Ready(role, facts))


def _settings(role: str, options: argparse.Namespace, secret: bytes) -> WorkerSettings:
    return WorkerSettings(
        host=options.host,
        advertise_host=options.advertise_host,
        transport=options.transport,
        transport_options=dict(options.transport_options),
        trusted_fabric=options.trusted_fabric,
        bootstrap_allow=read_allowed(options.bootstrap_allow) if role == "decode" else None,
        secret=secret,
        timeouts=Timeouts(
            bootstrap_s=options.bootstrap_timeout_s,
            waiting_s=options.waiting_timeout_s,
            stall_s=options.stall_timeout_s,
            drain_s=options.drain_timeout_s,
        ),
        link_limits=LinkLimits(heartbeat_s=options.heartbeat_s),
        checksum=options.checksum,
        engine=EngineOptions(
            pool_pages=options.pages,
            page_tokens=options.page_tokens,
            chunk_tokens=options.chunk_tokens,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            refusal_s=options.bootstrap_timeout_s,
            prefix_cache=options.prefix_cache,
        ),
    )


async def _until_cancelled(ready: Ready) -> None:
    print(ready.line(), flush=True)
    await asyncio.get_running_loop().create_future()

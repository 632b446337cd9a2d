"""Load the model and serve, for `kvroom prefill` and `kvroom decode`, after their settings have been checked.

Importing this module imports torch.
"""

from __future__ import annotations

import asyncio

from kvroom import LinkLimits, Timeouts
from kvroom.engine.options import EngineOptions
from kvroom.engine.weights import find, load
from kvroom.network import HostPort, advertised_host, read_allowed
from kvroom.serve.worker import HttpPorts, ServedModel, WorkerSettings, decode_worker, prefill_worker

from .options import DecodeOptions, PrefillOptions, WorkerOptions
from .ports import port_of
from .processes import Ready
from .progress import Report


def load_model(options: WorkerOptions, report: Report) -> ServedModel:
    """Find, convert if necessary, and load `--model`. Raises `ConfigurationError` if that is not possible."""
    path = find(options.model, progress=report)
    model = load(
        options.model, dtype=options.dtype, device=options.device, name=options.served_model_name, progress=report
    )
    return ServedModel(model, path)


async def serve(options: PrefillOptions | DecodeOptions, served: ServedModel, secret: bytes, http: HttpPorts) -> None:
    """Serve on the bound sockets until cancelled. Print the ready line on stdout when requests are accepted."""
    settings = WorkerSettings(
        host=options.host,
        advertise_host=options.advertise_host,
        link_port=options.link_port,
        transport=options.transport,
        transport_options=dict(options.transport_option),
        trusted_fabric=options.trusted_fabric,
        bootstrap_allow=read_allowed(options.bootstrap_allow) if isinstance(options, DecodeOptions) else None,
        secret=secret,
        timeouts=Timeouts(
            bootstrap_s=options.bootstrap_s,
            waiting_s=options.waiting_s,
            stall_s=options.stall_s,
            drain_s=options.drain_s,
        ),
        link_limits=LinkLimits(heartbeat_s=options.heartbeat_s),
        checksum=options.checksum,
        engine=EngineOptions(
            pool_pages=options.pages,
            page_tokens=options.page_tokens,
            chunk_tokens=options.chunk_tokens,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            refusal_s=options.bootstrap_s,
            prefix_cache=options.prefix_cache,
        ),
    )
    where = HostPort.of(advertised_host(options.host, options.advertise_host), port_of(http.clients))
    facts = {"url": where.url(), "admin_url": http.admin_url, "model": served.model.name}
    if isinstance(options, PrefillOptions):
        async with prefill_worker(served, settings, http, bootstrap_port=options.bootstrap_port) as bootstrap_port:
            await _until_cancelled(Ready(options.role, {**facts, "bootstrap_port": str(bootstrap_port)}))
    else:
        async with decode_worker(served, settings, http):
            await _until_cancelled(Ready(options.role, facts))


async def _until_cancelled(ready: Ready) -> None:
    print(ready.line(), flush=True)
    await asyncio.get_running_loop().create_future()

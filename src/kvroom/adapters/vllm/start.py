"""The start and end of a vLLM worker's parts: its manager, its status server, and a producer's bootstrap directory.

If one part cannot start, those that have started are closed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from functools import partial
from typing import Any

from kvroom import KVBootstrapServer, KVLayout, KVManager, LinkLimits, Parallel, Place, load_secret, wait_until_up
from kvroom.errors import BootstrapError, ConfigurationError
from kvroom.network import HostPort, load_admin_token, loopback_of, parse_address
from kvroom.status import StatusServer

from . import layout
from .settings import VLLMSettings
from .stats import KVRoomStats, StatsTaker
from .worker import WorkerSide

log = logging.getLogger("vllm." + __name__)
DIRECTORY_TIMEOUT_S = 60.0
_FIRST = Place(0, 0, 0, 0)


class ConnectorParts:
    """The running parts of one rank. `start_worker` creates them."""

    def __init__(self, side: WorkerSide, device: str, bootstrap_addr: str | None, parts: contextlib.ExitStack) -> None:
        self.side = side
        self.bootstrap_addr = bootstrap_addr
        self._on_device = device != "cpu"
        self._parts = parts
        self._taker = StatsTaker(side.manager)
        here = side.manager.place
        # The ranks of an engine move parts of the same tokens. Only the first one counts them, so that the sum over all
        # ranks is right.
        self._counts_tokens = (here.tp, here.pp) == (0, 0)

    def synchronize(self) -> None:
        """Wait until the forward pass has written its blocks. Return immediately on the CPU, where it has."""
        if self._on_device:
            import torch

            torch.accelerator.current_stream().synchronize()

    def stats(self) -> KVRoomStats | None:
        """Return the counts since the last call that returned some, or None; see `StatsTaker.take`."""
        side = self.side
        tokens = (side.tokens_loaded, side.tokens_sent) if self._counts_tokens else (0, 0)
        return self._taker.take(*tokens, time.monotonic(), busy=side.busy)

    def close(self) -> None:
        """Close the status server, end every room, and close the directory. Idempotent."""
        self._parts.close()


def directory_address(vllm_config: Any, settings: VLLMSettings) -> HostPort:
    """Return the address on which this engine's directory listens; port 0 stands for any free port.

    In vLLM each data-parallel rank is an engine of its own, so rank r takes the configured port + r.
    """
    port = settings.bootstrap_port
    return HostPort(settings.host, port + int(vllm_config.parallel_config.data_parallel_index) if port else 0)


def start_worker(vllm_config: Any, settings: VLLMSettings, pool: KVLayout, *, produces: bool) -> ConnectorParts:
    """Start all parts of the rank whose KV pool is `pool`.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        settings: The operator's settings.
        pool: The layout of this rank's KV cache.
        produces: True for a producer. Its first rank serves the directory, and all of its ranks register there.

    Raises:
        KVRoomError: A setting is invalid, a port is taken, the directory or the transport does not start. Nothing is
            left running then.
    """
    parallel, place = layout.parallel(vllm_config), layout.place(vllm_config)
    secret = load_secret(os.environ, settings.secret_file)
    settings.check_status_server(load_admin_token(os.environ))
    listen = directory_address(vllm_config, settings)
    rank = rank_of(vllm_config, parallel, place)
    engines = _engines(vllm_config)
    settings.check_ports(engines * parallel.pp * parallel.tp, directories=engines if produces else 0)
    with contextlib.ExitStack() as undo:
        register_with = reached = None
        if produces and place == _FIRST:
            server = KVBootstrapServer(listen.host, listen.port, secret=secret)
            port = parse_address(server.start()).port
            undo.callback(server.close)
            register_with = str(HostPort(loopback_of(listen.host), port))
            reached = str(HostPort(settings.bootstrap_host or settings.reached_by, port))
            log.info("bootstrap directory at %s", reached)
        elif produces:
            register_with = _directory_of_first_rank(listen, settings)
        open_manager = partial(
            KVManager,
            pool,
            host=settings.host,
            port=_port_of_rank(settings.link_port, rank),
            advertise_host=settings.advertise_host,
            transport=settings.transport,
            transport_options=settings.transport_options,
            trusted_fabric=settings.trusted_fabric,
            bootstrap_allow=settings.bootstrap_allow,
            secret=secret,
            register_with=register_with,
            parallel=parallel,
            place=place,
            timeouts=settings.timeouts,
            link_limits=LinkLimits(heartbeat_s=settings.heartbeat_s),
            checksum=settings.checksum,
        )
        side = WorkerSide(lambda wake: open_manager(on_change=wake), settings.idle_wait_s)
        undo.callback(side.close)
        _start_status_server(settings, side, rank, undo)
        device = pool.regions[0].device
        return ConnectorParts(side, device, reached, undo.pop_all())


def _engines(vllm_config: Any) -> int:
    """Return the number of data-parallel engines, as far as this one knows: vLLM tells a dense model's engine 1."""
    config = vllm_config.parallel_config
    return max(int(config.data_parallel_size), int(config.data_parallel_index) + 1)


def rank_of(vllm_config: Any, parallel: Parallel, place: Place) -> int:
    """Return the number of this rank among all ranks of all data-parallel engines."""
    engine = int(vllm_config.parallel_config.data_parallel_index)
    return (engine * parallel.pp + place.pp) * parallel.tp + place.tp


def _port_of_rank(first: int, rank: int) -> int:
    return first + rank if first else 0


def _start_status_server(settings: VLLMSettings, side: WorkerSide, rank: int, undo: contextlib.ExitStack) -> None:
    """Serve the state of this rank's rooms over HTTP, for `kvroom rooms`, unless `rooms_port` is None."""
    if settings.rooms_port is None:
        return
    manager = side.manager
    server = StatusServer(
        manager,
        settings.rooms_host,
        _port_of_rank(settings.rooms_port, rank),
        token=load_admin_token(os.environ),
        extra=lambda: {"requests": side.counts()},
    )
    server.start()
    undo.callback(server.close)
    log.info("rooms of rank %s: kvroom rooms %s", manager.place, server.url)


def _directory_of_first_rank(listen: HostPort, settings: VLLMSettings) -> str:
    """Return the address of the directory, once the first rank, which starts at about the same time, serves it."""
    if listen.port == 0:
        raise ConfigurationError(
            "bootstrap_port is 0, but this engine has several ranks, which share one directory: set a port"
        )
    address = str(HostPort(settings.bootstrap_host or settings.reached_by, listen.port))
    try:
        wait_until_up(address, DIRECTORY_TIMEOUT_S)
    except BootstrapError as error:
        raise ConfigurationError(
            f"{error}: the producer's first rank serves it; check bootstrap_host and bootstrap_port"
        ) from None
    return address

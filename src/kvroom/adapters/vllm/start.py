"""The parts that one vLLM worker runs for its rooms: manager, view of rooms, statistics, and perhaps a directory.

The first rank of a producer runs the directory. Either all parts start or none does, and all end with the worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from functools import partial
from typing import Any

from kvroom import KVBootstrapServer, KVLayout, KVManager, LinkLimits, Place, load_secret, wait_until_up
from kvroom.errors import BootstrapError, ConfigurationError
from kvroom.network import HostPort, load_admin_token, loopback_of, parse_address
from kvroom.status import StatusServer

from . import layout
from .settings import VLLMSettings
from .stats import KVRoomStats, StatsTaker
from .worker import WorkerSide

log = logging.getLogger("vllm." + __name__)
DIRECTORY_PATIENCE_S = 60.0
_FIRST = Place(0, 0, 0, 0)


class ConnectorParts:
    """The parts of one rank, created by `worker`. `close` ends them in an order that leaves nothing open."""

    def __init__(self, side: WorkerSide, device: str, bootstrap_addr: str | None, parts: contextlib.ExitStack) -> None:
        self.side = side
        self.bootstrap_addr = bootstrap_addr
        self._on_device = device != "cpu"
        self._parts = parts
        self._taker = StatsTaker(side.manager)
        here = side.manager.place
        self._counts_tokens = (here.tp, here.pp) == (0, 0)  # the ranks move parts of the same tokens

    def synchronize(self) -> None:
        """Wait until the launched forward pass has written its blocks. On a CPU it has done so already."""
        if self._on_device:
            import torch

            torch.accelerator.current_stream().synchronize()

    def stats(self) -> KVRoomStats | None:
        """Return what has happened since the last report, or None if it is too early for another one."""
        side = self.side
        tokens = (side.tokens_loaded, side.tokens_sent) if self._counts_tokens else (0, 0)
        return self._taker.take(*tokens, time.monotonic(), busy=side.busy)

    def close(self) -> None:
        """End all parts. Idempotent."""
        self._parts.close()


def directory(vllm_config: Any, settings: VLLMSettings) -> HostPort:
    """Return the address of this engine's directory; port 0 for any free port.

    In vLLM each data-parallel rank is an engine of its own, so each has a port of its own.
    """
    port = settings.bootstrap_port
    return HostPort(settings.host, port + int(vllm_config.parallel_config.data_parallel_index) if port else 0)


def worker(vllm_config: Any, settings: VLLMSettings, pool: KVLayout, *, produces: bool) -> ConnectorParts:
    """Start all parts for the rank whose KV pool is `pool`. After an error, nothing is left running.

    Raises:
        ConfigurationError: A setting is invalid, or the directory of the first rank does not answer.
        BootstrapError: The rank cannot be registered.
        TransportError: The transport cannot be started.
    """
    parallel, place = layout.parallel(vllm_config), layout.place(vllm_config)
    secret = load_secret(os.environ, settings.secret_file)
    settings.check_window(load_admin_token(os.environ))
    listen = directory(vllm_config, settings)
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
            register_with = _other_rank(listen, settings)
        open_manager = partial(
            KVManager,
            pool,
            host=settings.host,
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
        _open_window(vllm_config, settings, side, undo)
        device = pool.regions[0].device
        return ConnectorParts(side, device, reached, undo.pop_all())


def _open_window(vllm_config: Any, settings: VLLMSettings, side: WorkerSide, undo: contextlib.ExitStack) -> None:
    """Open the HTTP view of this rank's rooms, for `kvroom rooms`."""
    if settings.rooms_port is None:
        return
    manager = side.manager
    here = manager.place
    engine = int(vllm_config.parallel_config.data_parallel_index)
    rank = (engine * manager.parallel.pp + here.pp) * manager.parallel.tp + here.tp
    port = settings.rooms_port + rank if settings.rooms_port else 0
    window = StatusServer(
        manager,
        settings.rooms_host,
        port,
        token=load_admin_token(os.environ),
        extra=lambda: {"requests": side.counts()},
    )
    window.start()
    undo.callback(window.close)
    log.info("rooms of rank %s: kvroom rooms %s", here, window.url)


def _other_rank(listen: HostPort, settings: VLLMSettings) -> str:
    """Wait for the directory of the first rank and return its address. Raise `ConfigurationError` if it times out."""
    if listen.port == 0:
        raise ConfigurationError("bootstrap_port is 0, but this engine has several ranks, which share one: give a port")
    address = str(HostPort(settings.bootstrap_host or settings.reached_by, listen.port))
    try:
        wait_until_up(address, DIRECTORY_PATIENCE_S)
    except BootstrapError as error:
        raise ConfigurationError(
            f"{error}: the producer's first rank serves it; check bootstrap_host and bootstrap_port"
        ) from None
    return address

"""`nixl`: NVIDIA's NIXL moves the blocks, with its UCX backend unless another one is named.

NIXL cannot cancel a transfer: to release the handle of a transfer in flight proves nothing about its bytes. So a handle
is never released before its transfer has ended. NIXL's Python class makes the progress thread spin. The agent is
created through the bindings instead, with a delay: then the same thread sleeps until UCX has an event, and an idle
agent costs almost no processor time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import U64, MemoryRange
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.devices import DeviceBatch, device_memory
from kvroom.transports.kit.options import TransportOptions
from kvroom.transports.kit.probing import ProbeResult, nvidia_gpus, package, rdma_devices

from .engine import EngineTransfer, OneSidedDescription, OneSidedEngine, engine_name
from .exposure import is_loopback
from .options import OneSidedOptions
from .transport import OneSidedTransport

_BINDINGS = "nixl_cu12._bindings"
_UCX = "UCX"
_CONFIG, _ON_LOOPBACK = "engine_config", "NET_DEVICES=lo"  # `device_list` wants names with a port: no "lo"
_PROGRESS_US = 100_000  # the longest that the progress thread sleeps; events wake it
_SPINS = 200  # polls of a transfer before the first pause: a page takes a few microseconds
_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


class _NixlDescription(OneSidedDescription, frozen=True, tag="nixl"):
    pass


class _NixlEngine(OneSidedEngine[str]):
    """A NIXL agent with one backend; a session is the name of the peer's agent."""

    depth = 2

    def __init__(self, name: str, backend: str, parameters: Mapping[str, str]) -> None:
        try:
            self._nixl: Any = importlib.import_module(_BINDINGS)
        except ImportError as error:
            raise ConfigurationError(f"nixl cannot be loaded ({error}): pip install nixl-cu12") from error
        named = vars(self._nixl).values()
        self._errors = tuple(kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception))
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_RW
        self._agent = self._nixl.nixlAgent(name, config)
        plugins = self._agent.getAvailPlugins()
        if backend not in plugins:
            raise ConfigurationError(f"nixl: backend={backend!r} is not installed: choose one of {', '.join(plugins)}")
        self._backend, self._parameters = backend, dict(parameters)
        self._name, self._head = name, b""
        self._handle: Any = None
        self._registered: list[Any] = []

    def fabric(self) -> str:
        if self._backend != _UCX:
            return f"NIXL's backend {self._backend}"
        if self._parameters.get(_CONFIG) == _ON_LOOPBACK:
            return ""
        used = rdma_devices()
        return f"the RDMA devices {', '.join(used)}" if used else ""

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        try:
            self._handle = self._agent.createBackend(self._backend, self._parameters)
            for piece in device_memory("nixl", memory, ("cpu", "cuda")):
                row = (piece.address, piece.nbytes, _index(piece.device), b"")
                listed = self._nixl.nixlRegDList(self._segment(piece.device), [row])
                self._agent.registerMem(listed, [self._handle])
                self._registered.append(listed)
            metadata = bytes(self._agent.getLocalMD())
        except self._errors as error:
            raise ConfigurationError(f"nixl cannot use this memory through {self._backend}: {error}") from error
        self._head = metadata.partition(self._name.encode())[0]
        return metadata

    def join(self, described: OneSidedDescription) -> str:
        # A hostile peer could send the metadata of another agent, and loading it would replace what NIXL has stored
        # about that agent. NIXL returns the agent's name only after loading. So the name is checked before: metadata of
        # this form begins like this side's own, up to the name.
        name, metadata = engine_name(described.endpoint), described.engine
        if not metadata.startswith(self._head):
            raise TransportError(
                "nixl: the peer's metadata has another format than this side's: use one version of NIXL on both sides"
            )
        if not metadata.startswith(name.encode(), len(self._head)):
            raise MalformedDescription("nixl: the peer's metadata belongs to another agent")
        try:
            self._agent.loadRemoteMD(metadata)
            self._agent.makeConnection(name, [self._handle])
        except self._errors as error:
            raise TransportError(f"nixl cannot reach the peer: {error}") from error
        return name

    def begins_at_once(self, session: str) -> bool:  # noqa: ARG002 - posting never waits for a peer
        return True

    def begin(self, session: str, batch: DeviceBatch) -> int | None:
        nixl, blocks = self._nixl, batch.blocks
        try:
            local = nixl.nixlXferDList(self._segment(batch.source), _rows(blocks.src, blocks.length, batch.source))
            remote = nixl.nixlXferDList(self._segment(batch.sink), _rows(blocks.dst, blocks.length, batch.sink))
            request: int = self._agent.createXferReq(nixl.NIXL_WRITE, local, remote, session, b"", [self._handle])
        except self._errors as error:
            raise TransportError(f"nixl refused a batch: {error}") from error
        return None if self._ended(request, self._agent.postXferReq, request, b"") else request

    def finish(self, session: str, begun: int, transfer: EngineTransfer) -> None:  # noqa: ARG002
        polls, pause_s = 0, _PAUSE_S
        while not self._ended(begun, self._agent.getXferStatus, begun):
            if transfer.abandoned:
                raise TransportError("nixl: this transport was closed while a transfer was in flight")
            polls += 1
            if polls > _SPINS:
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.2, _LONGEST_PAUSE_S)

    def _ended(self, request: int, ask: Callable[..., Any], *args: Any) -> bool:
        """Return True once a request has landed. Release it when it has ended; raise `TransportError` if it failed."""
        try:
            state = ask(*args)
        except self._errors as error:
            self._agent.releaseXferReq(request)
            raise TransportError(f"nixl could not write to the peer: {error}") from error
        if state == self._nixl.NIXL_IN_PROG:
            return False
        self._agent.releaseXferReq(request)
        if state != self._nixl.NIXL_SUCCESS:
            raise TransportError(f"nixl could not write to the peer: {state}")
        return True

    def leave(self, session: str) -> None:
        with contextlib.suppress(*self._errors):  # an error says that the connection is broken already
            self._agent.invalidateRemoteMD(session)

    def stop(self) -> None:
        for listed in self._registered:
            self._agent.deregisterMem(listed, [self._handle])
        self._registered.clear()
        del self._agent  # the last reference: ends its threads and closes its connections

    def way(self) -> str:
        return f"{self._backend} chooses the path"

    def _segment(self, device: str) -> Any:
        return self._nixl.DRAM_SEG if device == "cpu" else self._nixl.VRAM_SEG


class NixlOptions(OneSidedOptions, frozen=True, kw_only=True):
    """UCX is configured by its own environment variables (`UCX_TLS`, `UCX_NET_DEVICES`, ...)."""

    backend: Annotated[str, Meta(description="a NIXL plugin that writes to memory of other processes")] = _UCX
    parameters: Annotated[dict[str, str], Meta(description="settings of that backend, by its own names")] = {}


class NixlTransport(OneSidedTransport[str]):
    """The transport over NIXL.

    If `host` is a loopback host, UCX is restricted to the device `lo`, unless its devices are named or the operator
    trusts the network (`trusted_fabric`).

    Raises:
        ConfigurationError: The package or the plugin is missing.
    """

    name: ClassVar[str] = "nixl"
    options: ClassVar[type[TransportOptions]] = NixlOptions
    description: ClassVar[type[OneSidedDescription]] = _NixlDescription

    def __init__(self, options: NixlOptions | None = None) -> None:
        given = (options or NixlOptions()).checked(self.name)
        settings = dict(given.parameters)
        # One `engine_config` carries several settings, so it may have chosen the devices of UCX already.
        chosen = "UCX_NET_DEVICES" in os.environ or "device_list" in settings or _CONFIG in settings
        if given.backend == _UCX and not given.trusted_fabric and is_loopback(given.host) and not chosen:
            settings[_CONFIG] = _ON_LOOPBACK
        key = InstanceKey(self.name)
        super().__init__(_NixlEngine(engine_name(key.public), given.backend, settings), given, key)


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _rows(address: U64, length: U64, device: str) -> U64:
    rows = np.empty((address.size, 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = address, length, _index(device)
    return rows


def probe() -> ProbeResult:
    """Report if NIXL is installed. Without RDMA hardware it is slower than `local` and `tcp`."""
    part, missing = package("nixl-cu12", "nixl_cu12")
    rdma, gpus = rdma_devices(), nvidia_gpus()
    notes = (f"RDMA devices: {', '.join(rdma)}" if rdma else "no RDMA device: UCX uses shared memory and TCP",)
    reach = "uses RDMA devices, which every machine on their fabric reaches" if rdma else ""
    kinds = ("cpu", "cuda") if gpus else ("cpu",)
    return ProbeResult(part, missing, kinds, fast=bool(rdma), notes=notes, exposes=reach)

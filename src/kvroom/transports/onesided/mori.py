"""`mori`: AMD's MORI-IO moves the blocks, over RDMA or over XGMI between the GPUs of one machine.

An engine addresses memory by description and offset. So each block is looked up in the registered pieces of both sides,
and a batch is written as one list of blocks for each pair of pieces. mori's notifications of inbound transfers are off:
peers learn over their own link that a transfer has ended, and mori would keep every notification that is not fetched.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import msgspec
from msgspec import Meta

from kvroom.dialling.advertised import advertised_host
from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import MemoryRange
from kvroom.transports.base import MalformedDescription
from kvroom.transports.kit.data_keys import InstanceKey
from kvroom.transports.kit.devices import DeviceBatch, device_memory
from kvroom.transports.kit.options import TransportOptions
from kvroom.transports.kit.probing import Missing, ProbeResult, amd_gpus, library, package, rdma_devices

from .engine import (
    EngineTransfer,
    OneSidedDescription,
    OneSidedEngine,
    engine_name,
    read_card,
)
from .options import OneSidedOptions
from .pieces import Pieces, by_pieces
from .transport import OneSidedTransport

_MODULE = "mori.io"
_KINDS = {"RDMA": ("cpu", "cuda"), "XGMI": ("cuda",)}  # torch calls AMD's GPUs "cuda" as well
_REACH = "uses RDMA devices or links between GPUs, which check no secret"
_PYTHONS = ((3, 10), (3, 12))
_STEP_MS = 50
_GRACE_S = 2.0  # after the peer has failed: how long to wait for transfers whose end mori may never report


class _MoriDescription(OneSidedDescription, frozen=True, tag="mori"):
    pass


class _Card(msgspec.Struct, frozen=True):
    """The engine and its pieces, packed by mori, and the backend that they belong to."""

    backend: str
    engine: bytes
    memory: tuple[bytes, ...]


class _MoriSession(NamedTuple):
    """The peer's pieces, and mori's descriptions of its engine and of each piece."""

    engine: Any
    pieces: Pieces
    memory: list[Any]


class _MoriEngine(OneSidedEngine[_MoriSession]):
    depth = 2

    def __init__(self, module: Any, name: str, host: str, backend: str, settings: Mapping[str, Any]) -> None:
        self._mori, self._name, self._host, self._backend = module, name, host, backend
        self._config = _config(module, backend, settings)
        self._engine: Any = None
        self._pieces = Pieces(())
        self._memory: list[Any] = []
        self._lock = threading.Lock()
        self._given_up: list[Any] = []  # statuses that mori may still write to, so they must outlive its engine
        self._failures: dict[str, str] = {}  # errors of peers that failed, by the key of their engine

    def fabric(self) -> str:
        return f"mori's backend {self._backend}"

    def start(self, memory: Sequence[MemoryRange]) -> bytes:
        self._pieces = Pieces(device_memory("mori", memory, _KINDS[self._backend]))
        places = self._mori.MemoryLocationType
        try:
            self._engine = self._mori.IOEngine(self._name, self._mori.IOEngineConfig(self._host, 0))
            self._engine.create_backend(getattr(self._mori.BackendType, self._backend), self._config)
            for piece in self._pieces.memory:
                kind, _, index = piece.device.partition(":")
                where = (-1, places.CPU) if kind == "cpu" else (int(index or 0), places.GPU)
                self._memory.append(self._engine.register_memory(piece.address, piece.nbytes, *where))
            packed = tuple(each.pack() for each in self._memory)
            return msgspec.msgpack.encode(_Card(self._backend, self._engine.get_engine_desc().pack(), packed))
        except RuntimeError as error:
            raise ConfigurationError(f"mori cannot use this memory through {self._backend}: {error}") from error

    def join(self, described: OneSidedDescription) -> _MoriSession:
        card = read_card("mori", described, _Card)
        if card.backend != self._backend:
            both = f"this side uses {self._backend} and the peer {card.backend}"
            raise TransportError(f"mori: {both}: choose the same backend on both sides")
        try:
            engine = self._mori.EngineDesc.unpack(card.engine)
            memory = [self._mori.MemoryDesc.unpack(each) for each in card.memory]
            if {engine.key, *(each.engine_key for each in memory)} != {engine_name(described.endpoint)}:
                raise MalformedDescription(
                    "mori: the peer's description names the engine or the memory of another peer"
                )
            self._engine.register_remote_engine(engine)
        except RuntimeError as error:
            raise TransportError(f"mori cannot reach the peer: {error}") from error
        return _MoriSession(engine, Pieces(described.registered), memory)

    def begin(self, session: _MoriSession, batch: DeviceBatch) -> list[Any]:
        if failure := self._failure(session):
            raise TransportError(f"mori: the peer has failed ({failure})")
        pairs = by_pieces(batch.blocks, self._pieces, session.pieces)
        try:  # mori's sessions would save only a table lookup
            begun: list[Any] = self._engine.batch_write(
                [self._memory[pair.here] for pair in pairs],
                [pair.offset.tolist() for pair in pairs],
                [session.memory[pair.there] for pair in pairs],
                [pair.peer_offset.tolist() for pair in pairs],
                [pair.length.tolist() for pair in pairs],
                [self._engine.allocate_transfer_uid() for _ in pairs],
            )
        except RuntimeError as error:
            raise TransportError(f"mori refused a batch: {error}") from error
        return begun

    def finish(self, session: _MoriSession, begun: list[Any], transfer: EngineTransfer) -> None:
        pending, end_s = begun, math.inf
        while True:
            self._engine.wait_all(pending, _STEP_MS)
            pending = [status for status in pending if status.InProgress()]  # the others have landed or failed
            if not pending:
                break
            failure = self._failure(session)
            if failure:
                end_s = min(end_s, time.monotonic() + _GRACE_S)
            if transfer.abandoned or time.monotonic() > end_s:
                self._given_up += pending
                raise TransportError(f"mori: a transfer in flight was abandoned ({failure or 'this transport closes'})")
        for status in begun:
            if not status.Succeeded():
                why = "; ".join(text for text in (status.Message(), self._failure(session)) if text)
                raise TransportError(f"mori could not write to the peer ({status.Code()}): {why}")

    def _failure(self, session: _MoriSession) -> str:
        """Fetch mori's reports of failed peers; return the error of this one, or ""."""
        with self._lock:
            while (event := self._engine.pop_peer_failure()) is not None:
                if event.remote_engine_key:  # else a device here failed, which the statuses of its transfers report
                    self._failures[event.remote_engine_key] = f"{event.reason}, {event.detail}"
            return self._failures.get(session.engine.key, "")

    def leave(self, session: _MoriSession) -> None:
        with contextlib.suppress(RuntimeError):  # an error says that the connection is broken already
            self._engine.deregister_remote_engine(session.engine)
        self._failure(session)  # fetch and discard reports of the old connection, or the next one would fail by them
        with self._lock:
            self._failures.pop(session.engine.key, None)

    def stop(self) -> None:
        for each in self._memory:
            self._engine.deregister_memory(each)
        self._memory.clear()
        self._engine = None  # the last reference: ends its threads

    def way(self) -> str:
        return f"backend {self._backend}"


class MoriOptions(OneSidedOptions, frozen=True, kw_only=True):
    """Peers reach this side at `advertise`, or at `host` if it is not set.

    `settings` are `qp_per_transfer`, `post_batch_size`, `num_worker_threads`, `poll_cq_mode`, `num_nics_per_transfer`
    and others for rdma, `num_streams` for xgmi; the others keep mori's defaults.
    """

    backend: Annotated[str, Meta(description="rdma or xgmi")] = "rdma"
    settings: Annotated[dict[str, Any], Meta(description="of that backend, by mori's names")] = {}
    part: Annotated[str, Meta(description="the module to use; tests name a double")] = _MODULE


class MoriTransport(OneSidedTransport[_MoriSession]):
    """The transport over MORI-IO. `register` refuses it unless the operator trusts the fabric (`trusted_fabric`).

    Raises:
        ConfigurationError: mori cannot be loaded, or an option is invalid.
    """

    name: ClassVar[str] = "mori"
    options: ClassVar[type[TransportOptions]] = MoriOptions
    description: ClassVar[type[OneSidedDescription]] = _MoriDescription

    def __init__(self, options: MoriOptions | None = None) -> None:
        given = (options or MoriOptions()).checked(self.name)
        backend, host = given.backend.upper(), advertised_host(given.host, given.advertise)
        if backend not in _KINDS:
            raise ConfigurationError(f"mori: backend={given.backend!r} is not supported: choose rdma or xgmi")
        key = InstanceKey(self.name)
        try:
            module = importlib.import_module(given.part)
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: ROCm's own package is there but broken
            remedies = "; ".join(f"{each.what}: {each.remedy}" for each in probe().missing) or "reinstall its package"
            raise ConfigurationError(
                f"mori: {given.part} cannot be loaded ({error}). Missing here: {remedies}"
            ) from error
        engine = _MoriEngine(module, engine_name(key.public), host, backend, given.settings)
        super().__init__(engine, given, key)


def _config(mori: Any, backend: str, settings: Mapping[str, Any]) -> Any:
    config = mori.RdmaBackendConfig(enable_notification=False) if backend == "RDMA" else mori.XgmiBackendConfig()
    for field, value in settings.items():
        try:
            setattr(config, field, getattr(mori.PollCqMode, value.upper()) if field == "poll_cq_mode" else value)
        except (AttributeError, TypeError) as error:
            raise ConfigurationError(f"mori cannot be set to {field}={value!r} for {backend}: {error}") from error
    return config


def probe() -> ProbeResult:
    """Report if mori, a Python that it has wheels for, ROCm, and a GPU or an RDMA device are present."""
    part, missing = package("amd-mori", "mori")
    if missing and sys.version_info[:2] not in _PYTHONS:
        missing += (Missing("a wheel of it for this Python", "package", "run with CPython 3.10 or 3.12"),)
    if library("libamdhip64.so.7", ""):
        missing += (Missing("ROCm 7 (libamdhip64.so.7)", "driver", "install ROCm 7 or the Python package rocm-sdk"),)
    gpus = amd_gpus()
    if not gpus and not rdma_devices():
        remedy = "run on a machine with one, and give the container its device files (/dev/kfd, /dev/infiniband)"
        missing += (Missing("an AMD GPU or an RDMA device", "device", remedy),)
    return ProbeResult(part, missing, ("cpu", "cuda") if gpus else ("cpu",), fast=not missing, exposes=_REACH)

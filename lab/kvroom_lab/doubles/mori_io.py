"""A double of mori.io 1.2.4 for `mori`, without ROCm, GPU and RDMA: it moves bytes between processes of one machine.

Names and arguments are those of `mori/io/engine.py` and of the bindings under it. A write is checked, becomes
IN_PROGRESS, and lands later, carried out by the engine's worker. The double refuses what mori refuses, with the same
status: a write without a backend, an unknown engine, memory that is not (or no longer) registered on either side,
offsets outside of it, lists of different lengths. The end of a peer's process is a failure of that peer, which
`pop_peer_failure` returns, and later writes to it fail until it is registered again. Memory of a GPU is host memory
here; XGMI accepts only memory that was declared as a GPU's.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.ranges import u64

from .remote import Remote, Served, Table

_CONNECT_S = 30.0


class BackendType(enum.Enum):
    Unknown = 0
    XGMI = 1
    RDMA = 2
    TCP = 3


class MemoryLocationType(enum.Enum):
    Unknown = 0
    CPU = 1
    GPU = 2


class StatusCode(enum.Enum):
    SUCCESS = 0
    INIT = 1
    IN_PROGRESS = 2
    ERR_INVALID_ARGS = 11
    ERR_NOT_FOUND = 12
    ERR_RDMA_OP = 13
    ERR_BAD_STATE = 14
    ERR_GPU_OP = 15


class PollCqMode(enum.Enum):
    POLLING = 0
    EVENT = 1


class PeerFailureReason(enum.Enum):
    UNKNOWN = 0
    PEER_UNREACHABLE = 1
    LOCAL_QP_ERROR = 2
    LOCAL_PORT_DOWN = 3
    LOCAL_DEVICE_FATAL = 4
    LOCAL_CQ_ERROR = 5


class _Typed:
    """Like the structures of the bindings: there are no other fields, and a value of another type is a TypeError."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__slots__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        before = getattr(self, name, value)
        if type(value) is not type(before):
            raise TypeError(f"{name}: incompatible function arguments")
        super().__setattr__(name, value)


class IOEngineConfig(_Typed):
    __slots__ = ("host", "port")

    def __init__(self, host: str = "", port: int = 0) -> None:
        self.host, self.port = host, port


class RdmaBackendConfig(_Typed):
    __slots__ = (
        "chunk_bytes",
        "enable_notification",
        "enable_transfer_chunking",
        "max_chunks_per_transfer",
        "max_cqe_num",
        "max_msg_sge",
        "max_send_wr",
        "notif_per_qp",
        "num_nics_per_transfer",
        "num_worker_threads",
        "poll_cq_mode",
        "post_batch_size",
        "qp_per_transfer",
    )

    def __init__(
        self,
        qp_per_transfer: int = 1,
        post_batch_size: int = -1,
        num_worker_threads: int = -1,
        poll_cq_mode: PollCqMode = PollCqMode.POLLING,
        enable_notification: bool = True,
        notif_per_qp: int = 1024,
        enable_transfer_chunking: bool = False,
        chunk_bytes: int = 65536,
        max_chunks_per_transfer: int = 64,
        num_nics_per_transfer: int = 1,
    ) -> None:
        self.qp_per_transfer, self.post_batch_size = qp_per_transfer, post_batch_size
        self.num_worker_threads, self.poll_cq_mode = num_worker_threads, poll_cq_mode
        self.enable_notification, self.notif_per_qp = enable_notification, notif_per_qp
        self.enable_transfer_chunking, self.chunk_bytes = enable_transfer_chunking, chunk_bytes
        self.max_chunks_per_transfer, self.num_nics_per_transfer = max_chunks_per_transfer, num_nics_per_transfer
        self.max_send_wr = self.max_cqe_num = self.max_msg_sge = 0


class XgmiBackendConfig(_Typed):
    __slots__ = ("num_events", "num_streams")

    def __init__(self, num_streams: int = 64, num_events: int = 64) -> None:
        self.num_streams, self.num_events = num_streams, num_events


class _Packed(msgspec.Struct, frozen=True):
    def pack(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, packed: bytes) -> Any:
        try:
            return msgspec.msgpack.decode(packed, type=cls)
        except msgspec.MsgspecError as error:
            raise RuntimeError(str(error)) from error


class EngineDesc(_Packed, frozen=True):
    key: str
    node_id: str
    hostname: str
    host: str
    port: int
    pid: int


class MemoryDesc(_Packed, frozen=True):
    engine_key: str
    id: int
    device_id: int
    data: int
    size: int
    loc: MemoryLocationType


@dataclasses.dataclass(frozen=True)
class PeerFailureEvent:
    remote_engine_key: str
    reason: PeerFailureReason
    qp_num: int = 0
    device_name: str = ""
    detail: str = ""


class TransferStatus:
    """The state of one transfer; the method names are mori's."""

    def __init__(self) -> None:
        self._code, self._message = StatusCode.INIT, ""
        self._ended = threading.Event()

    def Code(self) -> StatusCode:
        return self._code

    def Message(self) -> str:
        return self._message

    def Init(self) -> bool:
        return self._code is StatusCode.INIT

    def InProgress(self) -> bool:
        return self._code is StatusCode.IN_PROGRESS

    def Succeeded(self) -> bool:
        return self._code is StatusCode.SUCCESS

    def Failed(self) -> bool:
        return not (self.Init() or self.InProgress() or self.Succeeded())

    def Update(self, code: StatusCode, message: str) -> None:
        self._code, self._message = code, message
        if code is not StatusCode.IN_PROGRESS:
            self._ended.set()

    def WaitFor(self, timeout_ms: int = -1) -> StatusCode:
        if self.InProgress():
            self._ended.wait(None if timeout_ms < 0 else timeout_ms / 1000)
        return self._code


class _Refused(Exception):
    """A transfer fails before it starts, with this status."""

    def __init__(self, code: StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Peer:
    """A remote engine that was registered: the connection to it, opened by the first transfer, and its failure."""

    def __init__(self, desc: EngineDesc) -> None:
        self.desc = desc
        self.remote: Remote | None = None
        self.failed = False

    def fileno(self) -> int:
        return -1 if self.remote is None else self.remote.fileno()

    def hang_up(self) -> None:
        remote, self.remote = self.remote, None
        if remote is not None:
            remote.close()


class _Work(msgspec.Struct, frozen=True):
    peer: _Peer
    blocks: Blocks
    piece: int
    status: TransferStatus


class _Core:
    """The state that the worker shares with the engine. It lives until the engine is gone."""

    def __init__(self) -> None:
        self.peers: dict[str, _Peer] = {}
        self.failures: deque[PeerFailureEvent] = deque()
        self.lock = threading.RLock()
        self._orders: queue.SimpleQueue[_Work | _Peer | None] = queue.SimpleQueue()
        self._bell, self._heard = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="double-mori", daemon=True)
        self._thread.start()

    def put(self, order: _Work | _Peer | None) -> None:
        """Queue an order for the worker.

        A `_Work` is carried out, a registered peer is watched for its end, a deregistered one is closed, and None ends
        the worker.
        """
        self._orders.put(order)
        self._bell.send(b".")

    def stop(self, served: Served) -> None:
        self.put(None)
        self._thread.join()
        self._bell.close()
        self._heard.close()
        served.close()

    def _run(self) -> None:
        watched: dict[int, _Peer] = {}
        poller = select.poll()
        poller.register(self._heard, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd != self._heard.fileno():
                    poller.unregister(fd)
                    self._fail(watched.pop(fd))
                    continue
                self._heard.recv(1)
                order = self._orders.get()
                if isinstance(order, _Work):
                    self._carry_out(order)
                elif order is None:
                    for each in self.peers.values():
                        each.hang_up()
                    return
                elif self.peers.get(order.desc.key) is order:
                    poller.register(order.fileno(), select.POLLIN)
                    watched[order.fileno()] = order
                else:
                    if order.fileno() in watched:
                        poller.unregister(order.fileno())
                        del watched[order.fileno()]
                    order.hang_up()
                    break  # the number of the closed descriptor may be in use again: poll afresh

    def _fail(self, peer: _Peer) -> None:
        peer.failed = True
        detail = "completion status transport retry counter exceeded"
        self.failures.append(PeerFailureEvent(peer.desc.key, PeerFailureReason.PEER_UNREACHABLE, detail=detail))

    def _carry_out(self, work: _Work) -> None:
        try:
            with self.lock:  # held so that a peer which is deregistered is not written after that
                if work.peer.remote is None or work.peer.failed or self.peers.get(work.peer.desc.key) is not work.peer:
                    raise ConnectionResetError("the peer has failed")
                if not work.peer.remote.table().holds(work.blocks.dst, work.blocks.length, work.piece):
                    raise PermissionError("remote access error")
                work.peer.remote.write(work.blocks)
        except OSError as error:
            work.status.Update(StatusCode.ERR_RDMA_OP, str(error))
        else:
            work.status.Update(StatusCode.SUCCESS, "")


class IOEngine:
    def __init__(self, key: str, config: IOEngineConfig) -> None:
        self._table = Table()
        try:
            served = Served(config.host, config.port, self._table)
        except OSError as error:
            raise RuntimeError(f"cannot listen on {config.host}:{config.port}: {error}") from error
        host = socket.gethostname()
        self._desc = EngineDesc(key, host, host, config.host, served.port, os.getpid())
        self._core = _Core()
        self._backends: dict[BackendType, object] = {}
        self._ids, self._uids = itertools.count(1), itertools.count()
        self._memory: dict[int, MemoryDesc] = {}
        weakref.finalize(self, self._core.stop, served)

    def get_engine_desc(self) -> EngineDesc:
        return self._desc

    def create_backend(self, type: BackendType, config: Any = None) -> None:
        kinds = {BackendType.RDMA: RdmaBackendConfig, BackendType.XGMI: XgmiBackendConfig}
        if type not in kinds:
            raise NotImplementedError("backend not implemented yet")
        config = kinds[type]() if config is None else config
        if not isinstance(config, kinds[type]):
            raise TypeError("CreateBackend(): incompatible function arguments")
        if isinstance(config, RdmaBackendConfig) and config.num_nics_per_transfer < 1:
            raise RuntimeError(f"numNicsPerTransfer must be >= 1; got {config.num_nics_per_transfer}")
        self._backends.setdefault(type, config)

    def remove_backend(self, type: BackendType) -> None:
        self._backends.pop(type, None)

    def register_remote_engine(self, engine_desc: EngineDesc) -> None:
        with self._core.lock:
            self._core.peers.setdefault(engine_desc.key, _Peer(engine_desc))

    def deregister_remote_engine(self, engine_desc: EngineDesc) -> None:
        with self._core.lock:
            peer = self._core.peers.pop(engine_desc.key, None)
        if peer is not None:
            self._core.put(peer)

    def register_memory(self, ptr: int, size: int, device_id: int, mem_loc: MemoryLocationType) -> MemoryDesc:
        if not self._backends:
            raise RuntimeError("No available backend found, create backend first")
        desc = MemoryDesc(self._desc.key, next(self._ids), device_id, ptr, size, mem_loc)
        if not self._table.add(desc.id, ptr, size):
            raise RuntimeError("too many memory regions")
        self._memory[desc.id] = desc
        return desc

    def deregister_memory(self, mem_desc: MemoryDesc) -> None:
        self._table.remove(mem_desc.id)
        self._memory.pop(mem_desc.id, None)

    def allocate_transfer_uid(self) -> int:
        return next(self._uids)

    def batch_write(self, *args: Any) -> list[TransferStatus]:
        local, offsets, remote, remote_offsets, sizes, _ = args
        statuses = [TransferStatus() for _ in range(len(sizes))]
        if len({len(each) for each in args}) > 1:
            raise RuntimeError("batchSize == localOffsets.size()")
        for row in zip(local, offsets, remote, remote_offsets, sizes, statuses, strict=True):
            try:
                self._write(*row)
            except _Refused as error:
                row[-1].Update(error.code, str(error))
        return statuses

    def _write(
        self,
        local: MemoryDesc,
        offsets: Sequence[int],
        remote: MemoryDesc,
        remote_offsets: Sequence[int],
        sizes: Sequence[int],
        status: TransferStatus,
    ) -> None:
        if not len(offsets) == len(remote_offsets) == len(sizes):
            raise _Refused(StatusCode.ERR_INVALID_ARGS, "localOffsets.size() == remoteOffsets.size()")
        gpus = local.loc is remote.loc is MemoryLocationType.GPU
        if BackendType.RDMA not in self._backends and not (BackendType.XGMI in self._backends and gpus):
            raise _Refused(StatusCode.ERR_BAD_STATE, "No available backend found, create backend first")
        src, dst, length = u64(offsets), u64(remote_offsets), u64(sizes)
        if self._memory.get(local.id) != local:
            raise _Refused(StatusCode.ERR_INVALID_ARGS, "local protection error: the buffer is not registered")
        if ((src + length) > local.size).any() or ((dst + length) > remote.size).any():
            raise _Refused(StatusCode.ERR_INVALID_ARGS, "transfer offsets/lengths leave the registered range")
        peer = self._meet(remote.engine_key)
        blocks = Blocks(src + u64([local.data]), dst + u64([remote.data]), length)
        status.Update(StatusCode.IN_PROGRESS, "")
        self._core.put(_Work(peer, blocks, remote.id, status))

    def _meet(self, key: str) -> _Peer:
        peer = self._core.peers.get(key)
        if peer is None:
            raise _Refused(StatusCode.ERR_NOT_FOUND, f"remote engine {key} is not registered")
        if peer.remote is None and not peer.failed:
            try:
                remote = Remote(peer.desc.host, peer.desc.port, _CONNECT_S)
            except OSError as error:
                raise _Refused(StatusCode.ERR_BAD_STATE, f"BuildRdmaConn: remote engine {key}: {error}") from error
            with self._core.lock:
                peer.remote = remote
            self._core.put(peer)
        return peer

    def pop_peer_failure(self) -> PeerFailureEvent | None:
        return self._core.failures.popleft() if self._core.failures else None

    def wait_all(self, statuses: Sequence[TransferStatus], timeout_ms: int = -1) -> StatusCode:
        end_s = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000
        codes = []
        for status in statuses:
            left_ms = -1 if end_s is None else max(0, int((end_s - time.monotonic()) * 1000))
            codes.append(status.WaitFor(left_ms))
        bad = [code for code in codes if code not in (StatusCode.SUCCESS, StatusCode.IN_PROGRESS)]
        return bad[0] if bad else StatusCode.IN_PROGRESS if StatusCode.IN_PROGRESS in codes else StatusCode.SUCCESS

"""`local`: two processes on one machine; the source writes straight into the sink's memory.

Way `vm` is process_vm_writev(2) and needs leave to do so, tried out at `connect`; way `shm` needs the sink's pools to
come from `pool.allocate(..., shared=True)`. The sink takes no part in a write, so it cannot enforce a grant: `revoke`
proves nothing, and `fence` is proof only once the writer's process has ended, which its pidfd tells.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import machine
from kvroom.transports.base import Transfer, Transport
from kvroom.transports.handles import Handles
from kvroom.transports.iovec import IOV_MAX
from kvroom.transports.local_writers import NoWriter, PoolServer, ShmWriter, VmWriter, Writer, refusal
from kvroom.transports.pool import Pool, shared_pool
from kvroom.transports.transfers import (
    Ranges,
    cpu_memory,
    cut,
    failed,
    finished,
    normal,
    read_description,
    started,
)

_PIECE_BYTES = 4 << 20  # what one worker takes at a time, so that several share a big transfer
_ALONE_BYTES = 1 << 19  # below this, waking a second worker costs more than it saves
_AT_ONCE_BLOCKS = 64
_AT_ONCE_BYTES = 1 << 15  # below this, copying takes less time than waking a worker
_WAIT_S = 1.0


class Description(msgspec.Struct, frozen=True, tag="local"):
    """Who we are, where our registered memory and the probe cell lie, and who passes our shared pools on."""

    endpoint: bytes
    process: machine.Process
    probe: int
    ranges: tuple[tuple[int, int], ...]
    pools: tuple[tuple[int, int], ...]
    socket_name: str
    token: bytes


class _Peer:
    """What is kept for a peer: its memory, the way there, and the transfers that are under way."""

    def __init__(self, described: Description, pidfd: int, writer: Writer, reason: str) -> None:
        self.memory = Ranges.of(MemoryRange(*each) for each in described.ranges)
        self._pidfd = pidfd
        self.writer = writer
        self.reason = reason
        self.lock = threading.Lock()
        self.under_way: set[_Job] = set()

    def write(self, blocks: Blocks) -> None:
        """Write; raise `OSError` if the peer is or was meanwhile gone. Its pid may belong to somebody else by then."""
        if not self.gone():
            self.writer.write(blocks)
            if self.writer.mode == "vm" or not self.gone():
                return
        raise ProcessLookupError(errno.ESRCH, "the peer's process has ended")

    def cancel(self, reason: str) -> list[Transfer]:
        """Begin no further run of what is under way; return the transfers to wait for."""
        with self.lock:
            jobs = list(self.under_way)
        for job in jobs:
            job.cancel(reason)
        return [job.future for job in jobs]

    def gone(self) -> bool:
        """Whether the peer's process has ended."""
        return machine.exited(self._pidfd)

    def close(self) -> None:
        """Give up the way and the pidfd. Nothing is under way any more; called once."""
        self.writer.close()
        os.close(self._pidfd)


class _Job:
    """One transfer, cut into runs of blocks that any worker may take."""

    def __init__(self, peer: _Peer, blocks: Blocks) -> None:
        self.future = started()
        self._peer = peer
        self._nbytes = blocks.nbytes
        self._blocks, self._runs = cut(blocks, IOV_MAX, _PIECE_BYTES)
        self._lock = threading.Lock()
        self._workers = 0
        self._error = ""
        with peer.lock:
            peer.under_way.add(self)

    def share(self, threads: int) -> int:
        """Return how many workers shall take part; each must then call `work` once."""
        self._workers = 1 if self._nbytes < _ALONE_BYTES else min(threads, len(self._runs))
        return self._workers

    def work(self) -> None:
        """Write runs until none is left; the last worker finishes the future."""
        while (run := self._take()) is not None:
            start, stop = run
            try:
                self._peer.write(Blocks(*(part[start:stop] for part in self._blocks)))
            except OSError as error:
                self._error = f"local: writing into the peer failed: {error.strerror or error}"
        with self._lock:
            self._workers -= 1
            last = not self._workers
        if last:
            self._finish()

    def cancel(self, reason: str) -> None:
        """Fail the transfer unless its last run has begun."""
        with self._lock:
            if self._runs:
                self._error = self._error or reason

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            return None if self._error or not self._runs else self._runs.pop()

    def _finish(self) -> None:
        with self._peer.lock:
            self._peer.under_way.discard(self)
        if self._error:
            self.future.set_exception(TransportError(self._error))
        else:
            self.future.set_result(self._nbytes)


class LocalTransport(Transport):
    """Moves host memory between processes of one machine, pid namespace and user.

    `mode`: "vm", "shm", or "auto" for `vm` where it is permitted, else `shm`. `threads`: workers that copy, at most one
    per core; small transfers use one.
    """

    name: ClassVar[str] = "local"

    def __init__(self, mode: str = "auto", threads: int = 2) -> None:
        if mode not in ("auto", "vm", "shm") or threads < 1:
            raise ConfigurationError(f"local: mode={mode!r}, threads={threads}: take auto, vm or shm, and 1 or more")
        self.endpoint = secrets.token_bytes(16)
        self._mode = mode
        self._threads = min(threads, os.cpu_count() or 1)
        self._probe = ctypes.create_string_buffer(self.endpoint, len(self.endpoint))
        self._socket_name = f"kvroom-{secrets.token_hex(16)}"
        self._token = secrets.token_bytes(32)
        self._memory = Ranges.of(())
        self._pools: list[Pool] = []
        self._server: PoolServer | None = None
        self._handles: Handles[_Peer] = Handles(self.name)
        self._lock = threading.Lock()
        self._open = True
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []

    def register(self, memory: Sequence[MemoryRange]) -> None:
        listed = cpu_memory(self.name, memory)
        self._memory = Ranges.of(listed)
        found = [shared_pool(piece.address, piece.nbytes) for piece in listed]
        pools = list(dict.fromkeys(pool for pool in found if pool is not None))
        if self._mode != "shm":
            machine.allow_same_user_writers()
        if self._mode != "vm" and pools and None not in found and self._server is None:
            self._pools = pools
            self._server = PoolServer(self._socket_name, self._token, pools)

    def describe(self) -> bytes:
        pools = tuple((pool.address, pool.nbytes) for pool in self._pools)
        ranges = tuple((int(a), int(b - a)) for a, b in zip(self._memory.start, self._memory.stop, strict=True))
        address = ctypes.addressof(self._probe)
        me = machine.Process.current()
        return msgspec.msgpack.encode(
            Description(self.endpoint, me, address, ranges, pools, self._socket_name, self._token)
        )

    def connect(self, description: bytes) -> int:
        return self._meet(description, may_only_watch=False)

    def watch(self, description: bytes) -> int:
        return self._meet(description, may_only_watch=True)

    def _meet(self, description: bytes, may_only_watch: bool) -> int:
        described = read_description(description, Description)
        known = self._handles.attach(described.endpoint)
        if known is not None:
            return known
        peer = self._reach(described, may_only_watch)
        with self._lock:
            handle = self._handles.add(described.endpoint, peer) if self._open else 0
        if not handle:
            peer.close()
            raise TransportError("local: this transport is closed")
        if self._handles.find(handle) is not peer:  # another thread met the same peer meanwhile
            peer.close()
        return handle

    def _reach(self, described: Description, may_only_watch: bool) -> _Peer:
        with contextlib.ExitStack() as undo:
            pidfd = machine.watch(described.process)
            undo.callback(os.close, pidfd)
            reasons: list[str] = []
            writer = self._by_vm(described, reasons) if self._mode != "shm" else None
            if writer is None and self._mode != "vm":
                writer = self._by_shm(described, reasons)
            reason = "; ".join(reasons)
            if writer is None and not may_only_watch:
                raise TransportError(f"local: {reason}")
            undo.pop_all()
        return _Peer(described, pidfd, writer or NoWriter(reason), reason)

    @staticmethod
    def _by_vm(described: Description, reasons: list[str]) -> Writer | None:
        try:
            writer = VmWriter.probe(described.process.pid, described.probe, described.endpoint)
        except OSError as error:
            reasons.append(refusal(error, described.process.pid, described.process.uid))
            return None
        reasons.append("same machine, process_vm_writev permitted")
        return writer

    @staticmethod
    def _by_shm(described: Description, reasons: list[str]) -> Writer | None:
        if not described.pools:
            reasons.append("the peer's memory is not in shared pools (kvroom.transports.pool.allocate, shared=True)")
            return None
        try:
            name, token, uid = described.socket_name, described.token, described.process.uid
            writer = ShmWriter.ask(name, token, described.pools, uid)
        except (OSError, TransportError) as error:
            reasons.append(f"the peer's shared pools cannot be mapped: {error}")
            return None
        reasons.append("same machine, the peer's pools are mapped here as shared memory")
        return writer

    def mode_of(self, peer: int) -> str:
        """Return "vm" or "shm": the way that is used for this peer ("none" if it is only watched)."""
        return self._handles.get(peer).writer.mode

    def why(self, peer: int) -> str:
        return f"local ({self.mode_of(peer)}): {self._handles.get(peer).reason}"

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:  # noqa: ARG002 - see the module's law
        try:
            blocks = normal(blocks)
            self._memory.check("source", blocks.src, blocks.length, "this side registered")
            self._handles.get(peer).memory.check("destination", blocks.dst, blocks.length, "the peer registered")
            if not blocks.length.size:
                return finished(0)
            with self._lock:
                if not self._open:
                    raise TransportError("local: this transport is closed")
                job = _Job(self._handles.get(peer), blocks)  # asked for again: `fence` detaches under this lock
                workers = job.share(self._threads)
                if not self._at_once(blocks):
                    self._start_workers()
                    for _ in range(workers):
                        self._jobs.put(job)
                    return job.future
        except TransportError as error:
            return failed(error)
        job.work()
        return job.future

    @staticmethod
    def _at_once(blocks: Blocks) -> bool:
        return blocks.length.size <= _AT_ONCE_BLOCKS and blocks.nbytes <= _AT_ONCE_BYTES

    def _start_workers(self) -> None:
        while len(self._workers) < self._threads:
            worker = threading.Thread(target=self._work, name="kvroom-local", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.work()
            del job  # or it would live, and all that its callbacks know, until the next one comes

    def fence(self, peer: int) -> bool:
        target = self._handles.find(peer)
        if target is None:
            return True
        with self._lock:
            self._handles.detach(peer)
            cancelled = target.cancel("local: the peer was fenced")
        if concurrent.futures.wait(cancelled, _WAIT_S).not_done:
            return False
        with self._lock:  # two threads may fence the same peer: one of them drops it
            if self._handles.find(peer) is None:
                return True
            if not target.gone():
                return False
            self._handles.forget(peer)
            target.close()
        return True

    def close(self) -> None:
        with self._lock:
            self._open = False
            peers = [peer for peer in map(self._handles.forget, self._handles.all()) if peer is not None]
            cancelled = [future for peer in peers for future in peer.cancel("local: this transport was closed")]
            workers, self._workers = self._workers, []
            for _ in workers:
                self._jobs.put(None)
        for worker in workers:
            worker.join()
        concurrent.futures.wait(cancelled)  # small transfers run in the threads that submitted them
        for peer in peers:
            peer.close()
        if self._server is not None:
            self._server.close()
            self._server = None

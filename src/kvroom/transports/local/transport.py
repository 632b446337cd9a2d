"""`local`: two processes on one machine; the source writes straight into the sink's memory.

Host memory: mode `vm` is process_vm_writev(2), whose permission is tried at `connect`; mode `shm` requires that the
sink's pools come from `pool.allocate(..., shared=True)`. If both are available, `shm` writes small blocks that are
scattered in the sink, for each of which the kernel would need 400 ns. GPU memory: the source opens the sink's
allocations by CUDA IPC, and the driver copies into them; a transfer completes when the GPU has finished the copies. The
engine must synchronise with the GPU before it submits, because a copy does not wait for kernels that still write to the
pages.

The sink takes no part in a write, so it cannot enforce a grant: `revoke` proves nothing, and `fence` is proof only once
the writer's process has ended, which its pidfd shows. By then the driver has closed the writer's contexts, and none of
their copies is in flight. That holds as long as the writer has not forked a child that keeps the contexts open.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import secrets
import threading
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.base import Transport
from kvroom.transports.kit import machine
from kvroom.transports.kit.descriptions import read_description
from kvroom.transports.kit.devices import Devices, device_memory
from kvroom.transports.kit.options import TransportOptions
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.pool import Pool, shared_pool
from kvroom.transports.kit.probing import ProbeResult, library, nvidia_gpus
from kvroom.transports.kit.ranges import Ranges
from kvroom.transports.kit.transfers import Transfer
from kvroom.wire.keys import SigningKey

from .cuda import CudaAllocation, Gpus
from .peer import LocalDescription, LocalPeer, PeerAccess
from .pools import PoolServer
from .workers import WorkerPool

__all__ = ["LocalDescription", "LocalOptions", "LocalTransport", "probe"]

_WAIT_S = 1.0


class LocalOptions(TransportOptions, frozen=True, kw_only=True):
    """Options of `local`. Host memory is written by `vm`, process_vm_writev(2), or by `shm`, a pool that both map."""

    mode: Annotated[
        Literal["auto", "vm", "shm"], Meta(description="how host memory is written; auto uses whichever is available")
    ] = "auto"
    threads: Annotated[
        int, Meta(ge=1, description="limit on the threads that copy, at most one per core; small transfers use one")
    ] = 2
    cuda: Annotated[str, Meta(description="the module that calls the CUDA driver; tests name a double")] = (
        "kvroom.transports.local.cuda_driver"
    )


class LocalTransport(Transport):
    """Move host and GPU memory between processes of one machine, pid namespace and user."""

    name: ClassVar[str] = "local"
    options: ClassVar[type[TransportOptions]] = LocalOptions

    def __init__(self, options: LocalOptions | None = None) -> None:
        given = (options or LocalOptions()).checked(self.name)
        self.key = SigningKey()
        self.endpoint = self.key.public
        self._mode = given.mode
        self._gpus = Gpus(given.cuda)
        self._access = PeerAccess(given.mode, self._gpus)
        self._workers = WorkerPool(given.threads)
        self._probe = ctypes.create_string_buffer(self.endpoint, len(self.endpoint))
        self._socket_name = f"kvroom-{secrets.token_hex(16)}"
        self._token = secrets.token_bytes(32)
        self._devices = Devices(())
        self._ranges: dict[str, tuple[tuple[int, int], ...]] = {}
        self._allocations: tuple[CudaAllocation, ...] = ()
        self._pools: list[Pool] = []
        self._server: PoolServer | None = None
        self._peers: PeerTable[LocalPeer] = PeerTable(self.name)
        self._lock = threading.Lock()
        self._open = True

    def register(self, memory: Sequence[MemoryRange]) -> None:
        """Register as `Transport.register` does. GPU memory that cannot be shared raises `ConfigurationError`."""
        listed = device_memory(self.name, memory, ("cpu", "cuda"))
        self._memory, self._devices = Ranges.of(listed), Devices(listed)
        self._allocations = self._gpus.export(piece for piece in listed if piece.device != "cpu")
        for device in self._devices.names:
            merged = Ranges.of(piece for piece in listed if piece.device == device)
            self._ranges[device] = tuple((int(a), int(b - a)) for a, b in zip(merged.start, merged.stop, strict=True))
        found = [shared_pool(piece.address, piece.nbytes) for piece in listed if piece.device == "cpu"]
        pools = list(dict.fromkeys(pool for pool in found if pool is not None))
        if self._mode != "shm":
            machine.allow_same_user_writers()
        if self._mode != "vm" and pools and None not in found and self._server is None:
            self._pools = pools
            self._server = PoolServer(self._socket_name, self._token, pools)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(
            LocalDescription(
                endpoint=self.endpoint,
                process=machine.Process.current(),
                probe=ctypes.addressof(self._probe),
                ranges=self._ranges,
                pools=tuple((pool.address, pool.nbytes) for pool in self._pools),
                socket_name=self._socket_name,
                token=self._token,
                allocations=self._allocations,
            )
        )

    def connect(self, description: bytes) -> int:
        return self._attach(description, may_only_watch=False)

    def watch(self, description: bytes) -> int:
        return self._attach(description, may_only_watch=True)

    def _attach(self, description: bytes, may_only_watch: bool) -> int:
        described = read_description(description, LocalDescription)
        known = self._peers.attach(described.endpoint)
        if known is not None:
            return known
        if not self._open:
            raise TransportError("local: this transport is closed")
        peer = self._access.reach(described, self._devices, may_only_watch)
        with self._lock:
            handle = self._peers.add(described.endpoint, peer) if self._open else 0
        if not handle:  # another thread has closed this transport since
            peer.close()
            raise TransportError("local: this transport is closed")
        if self._peers.find(handle) is not peer:  # another thread has connected to the same peer
            peer.close()
        return handle

    def mode_of(self, peer: int) -> str:
        """Return the mode that is used for this peer: "vm", "shm", "vm+shm", "cuda", "vm+cuda" and so on; or "none"."""
        return self._peers.get(peer).writer.mode

    def explain(self, peer: int) -> str:
        return f"local ({self.mode_of(peer)}): {self._peers.get(peer).reason}"

    def _peer_memory(self, peer: int) -> Ranges:
        return self._peers.get(peer).memory

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:  # noqa: ARG002 - see the module's law
        with self._lock:
            if not self._open:
                raise TransportError("local: this transport is closed")
            target = self._peers.get(peer)  # looked up again: `fence` detaches under this lock
            transfer = target.begin(blocks)
            workers = transfer.share(self._workers.threads)
            if target.writer.waits or not transfer.small:
                self._workers.queue(transfer, workers)
                return transfer.future
        transfer.work()
        return transfer.future

    def fence(self, peer: int) -> bool:
        target = self._peers.find(peer)
        if target is None:
            return True
        with self._lock:
            self._peers.detach(peer)
            cancelled = target.cancel("local: the peer was fenced")
        if concurrent.futures.wait(cancelled, _WAIT_S).not_done:
            return False
        with self._lock:  # if two threads fence the same peer, one of them forgets it
            if self._peers.find(peer) is None:
                return True
            if not target.gone():
                return False
            self._peers.forget(peer)
            target.close()
        return True

    def close(self) -> None:
        with self._lock:
            self._open = False
            peers = [peer for peer in map(self._peers.forget, self._peers.all()) if peer is not None]
            cancelled = [future for peer in peers for future in peer.cancel("local: this transport was closed")]
            workers = self._workers.stop()
        for worker in workers:
            worker.join()
        concurrent.futures.wait(cancelled)  # small transfers run in the threads that submitted them
        for peer in peers:
            peer.close()
        self._gpus.close()
        if self._server is not None:
            self._server.close()
            self._server = None


def probe() -> ProbeResult:
    """Return that `local` is always available on Linux. The notes list its modes. The CUDA driver is not started."""
    refused = machine.writing_refused()
    host = "vm: process_vm_writev is permitted" if refused is None else f"only shm, with shared pools: {refused}"
    gpus, lacks = nvidia_gpus(), library("libcuda.so.1", "the NVIDIA driver")
    if gpus and not lacks:
        return ProbeResult("kvroom", devices=("cpu", "cuda"), notes=(host, f"cuda: {gpus} NVIDIA GPUs, by CUDA IPC"))
    reason = lacks[0].what if lacks else "no NVIDIA GPU in /dev; in a container, start it with --gpus"
    return ProbeResult("kvroom", notes=(host, f"no cuda: {reason}"))

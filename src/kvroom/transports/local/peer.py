"""A peer of `local`: what it says of itself, the way to its memory, and the transfers to it that are under way."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from functools import partial

import msgspec

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit import machine
from kvroom.transports.kit.devices import Devices
from kvroom.transports.kit.ranges import Ranges, u64
from kvroom.transports.kit.transfers import Transfer

from .cuda import CudaAllocation, Gpus, Whole, ordinal
from .cuda_writer import DeviceWriter, Windows
from .workers import CopiedTransfer
from .writers import EitherWriter, NoWriter, ShmWriter, VmWriter, Writer, refusal


class LocalDescription(msgspec.Struct, frozen=True, tag="local"):
    """Who we are, where our registered memory and the probe cell lie, and how our pools and allocations are opened.

    `ranges`: for each device, named as its owner does, pairs of address and size. `pools` are passed on by who listens
    at `socket_name`.
    """

    endpoint: bytes
    process: machine.Process
    probe: int
    ranges: dict[str, tuple[tuple[Whole, Whole], ...]]
    pools: tuple[tuple[Whole, Whole], ...]
    socket_name: str
    token: bytes
    allocations: tuple[CudaAllocation, ...] = ()

    def memory(self) -> list[MemoryRange]:
        """Return the registered memory."""
        return [MemoryRange(*each, device) for device, listed in self.ranges.items() for each in listed]

    def check(self) -> None:
        """Raise `TransportError` unless the allocations hold all registered memory that is not on the host."""
        opened = Ranges(u64(each.base for each in self.allocations), u64(each.nbytes for each in self.allocations))
        pieces = [piece for piece in self.memory() if piece.device != "cpu"]
        address, length = u64(piece.address for piece in pieces), u64(piece.nbytes for piece in pieces)
        if opened.first_outside(address, length) is not None:
            raise TransportError("local: the peer's description is malformed: it has GPU memory without a handle")


class LocalPeer:
    """What is kept for a peer."""

    def __init__(self, described: LocalDescription, pidfd: int, writer: Writer, reason: str) -> None:
        self.memory = Ranges.of(described.memory())
        self._pidfd = pidfd
        self.writer = writer
        self.reason = reason
        self._lock = threading.Lock()
        self._under_way: set[CopiedTransfer] = set()

    def begin(self, blocks: Blocks) -> CopiedTransfer:
        """Return a new transfer of these blocks, which counts as under way until it is done."""
        transfer = CopiedTransfer(blocks, self._write)
        transfer.afterwards = partial(self._leave, transfer)
        with self._lock:
            self._under_way.add(transfer)
        return transfer

    def _write(self, blocks: Blocks) -> None:
        """Write; raise `OSError` if the peer is or was meanwhile gone. Its pid may belong to somebody else by then."""
        if not self.gone():
            self.writer.write(blocks)
            if self.writer.mode == "vm" or not self.gone():
                return
        raise ProcessLookupError(errno.ESRCH, "the peer's process has ended")

    def _leave(self, transfer: CopiedTransfer) -> None:
        with self._lock:
            self._under_way.discard(transfer)

    def cancel(self, reason: str) -> list[Transfer]:
        """Begin no further run of what is under way; return the transfers to wait for."""
        with self._lock:
            transfers = list(self._under_way)
        for transfer in transfers:
            transfer.cancel(reason)
        return [transfer.future for transfer in transfers]

    def gone(self) -> bool:
        """Whether the peer's process has ended."""
        return machine.exited(self._pidfd)

    def close(self) -> None:
        """Give up the way and the pidfd. Nothing is under way any more; called once."""
        self.writer.close()
        os.close(self._pidfd)


class PeerAccess:
    """How this end reaches memory of others: `mode` for host memory ("vm", "shm" or "auto"), `gpus` for GPU memory."""

    def __init__(self, mode: str, gpus: Gpus) -> None:
        self._mode = mode
        self._gpus = gpus

    def reach(self, described: LocalDescription, own: Devices, may_only_watch: bool) -> LocalPeer:
        """Return the peer with a way to its memory from the devices `own`; raise `TransportError` if there is none.

        If we `may_only_watch` it, a peer that cannot be written will do; `OutOfReach` if it is not on this machine.
        """
        with contextlib.ExitStack() as undo:
            pidfd = machine.watch(described.process)
            undo.callback(os.close, pidfd)
            reasons: list[str] = []
            writer = self._writer(described, own, reasons)
            reason = "; ".join(reasons)
            if writer is None and not may_only_watch:
                raise TransportError(f"local: {reason}")
            undo.pop_all()
        return LocalPeer(described, pidfd, writer or NoWriter(reason), reason)

    def _writer(self, described: LocalDescription, own: Devices, reasons: list[str]) -> Writer | None:
        there = Devices(described.memory())
        host = self._to_host(described, reasons) if "cpu" in there.names else NoWriter("it has no host memory")
        if host is None or {*own.names, *there.names} == {"cpu"}:
            return host
        try:
            described.check()
            ours = [device for device in map(ordinal, own.names) if device is not None]
            same_process = described.process == machine.Process.current()
            windows = Windows(self._gpus, ours, described.allocations, same_process)
        except (OSError, TransportError) as error:
            host.close()
            reasons.append(f"the GPU memory of the two cannot meet: {str(error).removeprefix('local: ')}")
            return None
        reasons.append(f"GPU memory ({', '.join(own.names)} to {', '.join(there.names)}) by CUDA IPC")
        return DeviceWriter(self._gpus, own, there, host, windows)

    def _to_host(self, described: LocalDescription, reasons: list[str]) -> Writer | None:
        writer: Writer | None = None
        if self._mode != "shm":
            try:
                vm = VmWriter.probe(described.process.pid, described.probe, described.endpoint)
            except OSError as error:
                reasons.append(refusal(error, described.process.pid, described.process.uid))
            else:
                reasons.append("same machine, process_vm_writev permitted")
                shm = _by_shm(described, reasons) if self._mode == "auto" and described.pools else None
                writer = vm if shm is None else EitherWriter(vm, shm)
        if writer is None and self._mode != "vm":
            writer = _by_shm(described, reasons)
        return writer


def _by_shm(described: LocalDescription, reasons: list[str]) -> ShmWriter | None:
    if not described.pools:
        reasons.append("the peer's memory is not in shared pools (kvroom.transports.kit.pool.allocate, shared=True)")
        return None
    try:
        name, token, uid = described.socket_name, described.token, described.process.uid
        writer = ShmWriter.ask(name, token, described.pools, uid)
    except (OSError, TransportError) as error:
        reasons.append(f"the peer's shared pools cannot be mapped: {error}")
        return None
    reasons.append("same machine, the peer's pools are mapped here as shared memory")
    return writer

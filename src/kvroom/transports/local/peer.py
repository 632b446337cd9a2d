"""A peer of `local`: its description, the writer that reaches its memory, and the transfers in flight to it."""

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

from .cuda import CudaAllocation, Gpus, NonNegative, ordinal
from .cuda_writer import DeviceWriter, Windows
from .workers import CopiedTransfer
from .writers import EitherWriter, NoWriter, ShmWriter, VmWriter, Writer, refusal


class LocalDescription(msgspec.Struct, frozen=True, tag="local"):
    """The description of a `local` endpoint. Addresses are those of the process that it describes."""

    endpoint: bytes
    process: machine.Process
    probe: int
    """The address at which the endpoint lies in this process's memory, for a trial read and write by `vm`."""
    ranges: dict[str, tuple[tuple[NonNegative, NonNegative], ...]]
    """The registered memory: pairs of address and size for each device, named as in the process described."""
    pools: tuple[tuple[NonNegative, NonNegative], ...]
    """The shared pools, pairs of address and size."""
    socket_name: str
    """The abstract Unix socket at which the pools' descriptors are passed on."""
    token: bytes
    """The token that a caller must send at that socket."""
    allocations: tuple[CudaAllocation, ...] = ()

    def memory(self) -> list[MemoryRange]:
        """Return the registered memory."""
        return [MemoryRange(*each, device) for device, listed in self.ranges.items() for each in listed]

    def check(self) -> None:
        """Raise `TransportError` unless the allocations contain all registered memory that is not on the host."""
        opened = Ranges(u64(each.base for each in self.allocations), u64(each.nbytes for each in self.allocations))
        pieces = [piece for piece in self.memory() if piece.device != "cpu"]
        address, length = u64(piece.address for piece in pieces), u64(piece.nbytes for piece in pieces)
        if opened.first_outside(address, length) is not None:
            raise TransportError("local: the peer's description is malformed: it has GPU memory without a handle")


class LocalPeer:
    """The transport's record of a peer."""

    def __init__(self, described: LocalDescription, pidfd: int, writer: Writer, reason: str) -> None:
        self.memory = Ranges.of(described.memory())
        self._pidfd = pidfd
        self.writer = writer
        self.reason = reason
        self._lock = threading.Lock()
        self._in_flight: set[CopiedTransfer] = set()

    def begin(self, blocks: Blocks) -> CopiedTransfer:
        """Return a new transfer of these blocks, which counts as in flight until it completes."""
        transfer = CopiedTransfer(blocks, self._write)
        transfer.afterwards = partial(self._leave, transfer)
        with self._lock:
            self._in_flight.add(transfer)
        return transfer

    def _write(self, blocks: Blocks) -> None:
        """Write the blocks. Raise `OSError` if the peer has ended before or during the write.

        The check before the write keeps `vm` from writing into another process that has taken over the peer's pid.
        `shm` and CUDA write to memory that is mapped here and succeed even if the peer has ended, so for them there is
        a second check afterwards.
        """
        if not self.gone():
            self.writer.write(blocks)
            if self.writer.mode == "vm" or not self.gone():
                return
        raise ProcessLookupError(errno.ESRCH, "the peer's process has ended")

    def _leave(self, transfer: CopiedTransfer) -> None:
        with self._lock:
            self._in_flight.discard(transfer)

    def cancel(self, reason: str) -> list[Transfer]:
        """Stop the transfers in flight from starting further runs, and return the futures to wait for."""
        with self._lock:
            transfers = list(self._in_flight)
        for transfer in transfers:
            transfer.cancel(reason)
        return [transfer.future for transfer in transfers]

    def gone(self) -> bool:
        """Return True if the peer's process has ended."""
        return machine.exited(self._pidfd)

    def close(self) -> None:
        """Close the writer and the pidfd. Called once, when no transfer is in flight."""
        self.writer.close()
        os.close(self._pidfd)


class PeerAccess:
    """The ways by which this end reaches peers' memory: `mode` ("vm", "shm", "auto") for the host, `gpus` for GPUs."""

    def __init__(self, mode: str, gpus: Gpus) -> None:
        self._mode = mode
        self._gpus = gpus

    def reach(self, described: LocalDescription, own: Devices, may_only_watch: bool) -> LocalPeer:
        """Return the record of a peer, with a writer from the devices `own` to its memory.

        Args:
            described: The peer's description.
            own: The devices of this side's memory.
            may_only_watch: Accept a peer that cannot be written to.

        Raises:
            OutOfReach: The peer is on another machine or in another namespace.
            TransportError: The peer is gone, or its memory cannot be reached.
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
            reasons.append(f"no access to the peer's GPU memory: {str(error).removeprefix('local: ')}")
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
        writer = ShmWriter.connect(name, token, described.pools, uid)
    except (OSError, TransportError) as error:
        reasons.append(f"the peer's shared pools cannot be mapped: {error}")
        return None
    reasons.append("same machine, the peer's pools are mapped here as shared memory")
    return writer

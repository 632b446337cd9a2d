"""Writers into another process's host memory: the kernel copies (`vm`), or both sides map one pool (`shm`).

A writer moves blocks that have been checked. Several threads may use it at the same time; it is closed when none does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.kit import gather
from kvroom.transports.kit.iovec import Segments, copy_from_process, copy_to_process
from kvroom.transports.kit.machine import yama_scope
from kvroom.transports.kit.ranges import u64

from .pools import FDS_AT_A_TIME, HANDSHAKE_S, peer_uid

_GATHERED_BYTES = 1 << 10
"""If the source's segments have a smaller average length, `vm` gathers them first. Measured, strided source
and dense sink, GB/s gathered and direct: 256 bytes 2.3 and 1.8, 512 bytes 2.4 and 2.1, 1 KiB 2.7 and 2.9, 4 KiB 3.0 and
4.6."""

_SCATTERED_BYTES = 4 << 10
"""If both modes are available and the sink's segments have a smaller average length, `shm` writes them. Measured, TP
4->2: pieces of 512 bytes 3.1 GB/s, and 1.9 by `vm`; of 128 bytes 3.7 and 0.5."""

_LOOPED_BYTES = 8 << 10
"""From this average length on, `shm` copies block by block. Measured, GB/s by NumPy and block by block: 512 bytes 3.7
and 0.8, 2 KiB 4.0 and 2.3, 8 KiB 5.0 and 5.1, 32 KiB 7.8 and 11.1."""


class Writer(Protocol):
    """The interface between a transfer and the peer's memory."""

    mode: str
    waits: bool  # True if `write` waits for a device, so that it must not run in the submitting thread

    def write(self, blocks: Blocks) -> None:
        """Copy the blocks. Raise `OSError` on failure; some bytes may have landed then."""

    def close(self) -> None:
        """Release the writer's resources."""


class NoWriter:
    """The writer for a peer that is only watched. It refuses every write with the reason."""

    mode = "none"
    waits = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def write(self, blocks: Blocks) -> None:
        raise PermissionError(errno.EPERM, f"cannot move {blocks.nbytes} bytes: {self._reason}")

    def close(self) -> None:
        return


class VmWriter:
    """Write with process_vm_writev(2). Each side's adjacent blocks form one segment; small blocks are gathered."""

    mode = "vm"
    waits = False

    def __init__(self, pid: int) -> None:
        self._pid = pid

    @classmethod
    def probe(cls, pid: int, address: int, content: bytes) -> VmWriter:
        """Return a writer into process `pid`, after a trial read and write of `content` at `address` there.

        Raises:
            OSError: This process may not read or write that one.
            TransportError: Other bytes are at the address, so `pid` is another process.
        """
        cell = ctypes.create_string_buffer(len(content))
        here = (u64([ctypes.addressof(cell)]), u64([len(content)]))
        there = (u64([address]), u64([len(content)]))
        copy_from_process(pid, Segments(*here), Segments(*there))
        if cell.raw != content:
            raise TransportError(f"local: process {pid} is not the peer that described itself")
        copy_to_process(pid, Segments(*here), Segments(*there))
        return cls(pid)

    def write(self, blocks: Blocks) -> None:
        source = gather.merged(blocks.src, blocks.length)
        if blocks.nbytes >= _GATHERED_BYTES * source.length.size or source.length.size == 1:
            sink = gather.merged(blocks.dst, blocks.length)
            copy_to_process(self._pid, Segments(*source), Segments(*sink))
            return
        for start, stop in gather.chunks(blocks.length):
            src, dst, length = (part[start:stop] for part in blocks)
            packed = gather.gathered(src, length)
            copy_to_process(self._pid, Segments(*gather.whole(packed)), Segments(*gather.merged(dst, length)))

    def close(self) -> None:
        return


class Mapped:
    """A map from the peer's memory, in pieces (address, nbytes), to the addresses at which they are mapped here."""

    def __init__(self, pieces: Sequence[tuple[int, int]], here: Sequence[int]) -> None:
        order = sorted(range(len(pieces)), key=lambda i: pieces[i][0])
        self._start = u64(pieces[i][0] for i in order)
        self._stop = self._start + u64(pieces[i][1] for i in order)
        self._shift: U64 = u64(here[i] for i in order) - self._start  # wraps around, as the addition below does

    def translate(self, blocks: Blocks) -> U64:
        """Return the address here of each `blocks.dst`. Raise `OSError` if a block is not inside one piece."""
        index = np.maximum(np.searchsorted(self._start, blocks.dst, side="right"), 1) - 1
        if (blocks.dst + blocks.length > self._stop[index]).any():
            raise OSError("a block crosses the boundary between two of the peer's pools")
        here: U64 = blocks.dst + self._shift[index]
        return here

    def covers(self, address: int) -> bool:
        """Return True if the address is inside a piece."""
        return bool(((self._start <= address) & (np.uint64(address) < self._stop)).any())


class ShmWriter:
    """Write into the peer's pools, which are mapped here. The loop over blocks releases the GIL for each block."""

    mode = "shm"
    waits = False

    def __init__(self, fds: Sequence[int], pools: Sequence[tuple[int, int]]) -> None:
        self._maps = [mmap.mmap(fd, nbytes, mmap.MAP_SHARED) for fd, (_, nbytes) in zip(fds, pools, strict=True)]
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTFORK)  # otherwise a child could write after this process has ended
        self._memory = Mapped(pools, [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in self._maps])

    @classmethod
    def connect(cls, name: str, token: bytes, pools: Sequence[tuple[int, int]], uid: int) -> ShmWriter:
        """Return a writer into the pools [(address, nbytes)] of the process of user `uid` that listens at `name`.

        Raises:
            OSError: The process cannot be reached, or a pool cannot be mapped.
            TransportError: The process at `name` belongs to another user, or did not pass its pools on.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.ExitStack() as opened:
            connection.settimeout(HANDSHAKE_S)
            connection.connect("\0" + name)
            if peer_uid(connection) != uid:
                raise TransportError("a process of another user listens at the peer's socket")
            connection.sendall(token)
            fds: list[int] = []
            while len(fds) < len(pools):
                data, received, _, _ = socket.recv_fds(connection, 1, FDS_AT_A_TIME)
                for fd in received:
                    opened.callback(os.close, fd)
                if not data:
                    raise TransportError(
                        f"the peer (uid {uid}) did not pass them on to this process (uid {os.getuid()})"
                    )
                fds += received
            return cls(fds, pools)

    def write(self, blocks: Blocks) -> None:
        here = self._memory.translate(blocks)
        if blocks.nbytes < _LOOPED_BYTES * here.size:
            gather.copy(blocks._replace(dst=here))
            return
        for to, source, length in zip(here.tolist(), blocks.src.tolist(), blocks.length.tolist(), strict=True):
            ctypes.memmove(to, source, length)

    def close(self) -> None:
        for mapped in self._maps:
            mapped.close()


class EitherWriter:
    """Write by either mode: `shm` for small blocks that are scattered in the sink, `vm` for all others."""

    mode = "vm+shm"
    waits = False

    def __init__(self, vm: VmWriter, shm: ShmWriter) -> None:
        self._vm, self._shm = vm, shm

    def write(self, blocks: Blocks) -> None:
        segments = gather.merged(blocks.dst, blocks.length).length.size
        small = blocks.nbytes < _SCATTERED_BYTES * segments
        (self._shm if small else self._vm).write(blocks)

    def close(self) -> None:
        self._shm.close()


def refusal(error: OSError, pid: int, uid: int) -> str:
    """Return why process_vm_writev into `pid` was refused and what to do about it, in one sentence."""
    if os.getuid() not in (uid, 0):
        remedy = f"run both workers as one user (this one is uid {os.getuid()}, the peer uid {uid})"
    elif (yama_scope() or 0) > 1:
        remedy = f"set kernel.yama.ptrace_scope to 0 or 1 (it is {yama_scope()}) or give the workers CAP_SYS_PTRACE"
    else:
        remedy = (
            "let both workers run with the same capabilities and dumpable (prctl), and let the container's seccomp "
            "profile allow process_vm_readv and process_vm_writev"
        )
    return f"process_vm_writev into process {pid} was refused ({error.strerror}): {remedy}"

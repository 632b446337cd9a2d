"""The two ways into another process's memory: the kernel copies (`vm`), or both sides map one pool (`shm`).

A writer moves blocks that were checked already. It is used by several threads at once, and closed when none uses it.
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
from kvroom.transports.iovec import Segments, copy_from_process, copy_to_process
from kvroom.transports.local.pools import FDS_AT_A_TIME, HANDSHAKE_S, peer_uid
from kvroom.transports.machine import yama_scope
from kvroom.transports.transfers import u64


class Writer(Protocol):
    """What a transfer asks of a way into the peer's memory."""

    mode: str
    waits: bool  # for a device: then not in the thread that submits

    def write(self, blocks: Blocks) -> None:
        """Copy the blocks; raise `OSError`, after which some bytes have landed."""

    def close(self) -> None:
        """Give up what the writer holds."""


class NoWriter:
    """For a peer that is only watched: every write is refused with the reason."""

    mode = "none"
    waits = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def write(self, blocks: Blocks) -> None:
        raise PermissionError(errno.EPERM, f"cannot move {blocks.nbytes} bytes: {self._reason}")

    def close(self) -> None:
        return


class VmWriter:
    """Writes with process_vm_writev(2), at most 1,024 blocks a system call."""

    mode = "vm"
    waits = False

    def __init__(self, pid: int) -> None:
        self._pid = pid

    @classmethod
    def probe(cls, pid: int, address: int, content: bytes) -> VmWriter:
        """Return a writer if this process may read and write that one; `content` at `address` there stays as it is.

        Raise `OSError` where it may not, and `TransportError` where something else is at the address.
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
        copy_to_process(self._pid, Segments(blocks.src, blocks.length), Segments(blocks.dst, blocks.length))

    def close(self) -> None:
        return


class Mapped:
    """Memory of the peer, pieces (address, nbytes), and where each of them is mapped here."""

    def __init__(self, pieces: Sequence[tuple[int, int]], here: Sequence[int]) -> None:
        order = sorted(range(len(pieces)), key=lambda i: pieces[i][0])
        self._start = u64(pieces[i][0] for i in order)
        self._stop = self._start + u64(pieces[i][1] for i in order)
        self._shift: U64 = u64(here[i] for i in order) - self._start  # wraps around, as the addition below does

    def translate(self, blocks: Blocks) -> U64:
        """Return for each `blocks.dst` its address here; raise `OSError` if a block is not inside one piece."""
        index = np.maximum(np.searchsorted(self._start, blocks.dst, side="right"), 1) - 1
        if (blocks.dst + blocks.length > self._stop[index]).any():
            raise OSError("a block crosses the border of two pools of the peer")
        here: U64 = blocks.dst + self._shift[index]
        return here

    def covers(self, address: int) -> bool:
        """Whether the address is inside a piece."""
        return bool(((self._start <= address) & (np.uint64(address) < self._stop)).any())


class ShmWriter:
    """Writes into the peer's pools, mapped here; addresses are the peer's. The loop lets the GIL go for each block."""

    mode = "shm"
    waits = False

    def __init__(self, fds: Sequence[int], pools: Sequence[tuple[int, int]]) -> None:
        self._maps = [mmap.mmap(fd, nbytes, mmap.MAP_SHARED) for fd, (_, nbytes) in zip(fds, pools, strict=True)]
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTFORK)  # a child of this process must not outlive it as a writer
        self._memory = Mapped(pools, [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in self._maps])

    @classmethod
    def ask(cls, name: str, token: bytes, pools: Sequence[tuple[int, int]], uid: int) -> ShmWriter:
        """Return a writer into the pools [(address, nbytes)] of the process of user `uid` that listens at `name`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.ExitStack() as opened:
            connection.settimeout(HANDSHAKE_S)
            connection.connect("\0" + name)
            if peer_uid(connection) != uid:
                raise TransportError("another user answers at its socket")
            connection.sendall(token)
            fds: list[int] = []
            while len(fds) < len(pools):
                data, received, _, _ = socket.recv_fds(connection, 1, FDS_AT_A_TIME)
                for fd in received:
                    opened.callback(os.close, fd)
                if not data:
                    raise TransportError(f"it did not pass them on to uid {os.getuid()}; it is uid {uid}")
                fds += received
            return cls(fds, pools)

    def write(self, blocks: Blocks) -> None:
        here = self._memory.translate(blocks)
        for to, source, length in zip(here.tolist(), blocks.src.tolist(), blocks.length.tolist(), strict=True):
            ctypes.memmove(to, source, length)

    def close(self) -> None:
        for mapped in self._maps:
            mapped.close()


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

"""The two ways into another process's memory: the kernel copies (`vm`), or both sides map one pool (`shm`).

A writer moves blocks that were checked already. It is used by several threads at once, and closed when none uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hmac
import mmap
import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.iovec import Segments, copy_from_process, copy_to_process
from kvroom.transports.machine import yama_scope
from kvroom.transports.pool import Pool
from kvroom.transports.transfers import u64

_HANDSHAKE_S = 2.0
_FDS_AT_A_TIME = 64


class Writer(Protocol):
    """What a transfer asks of a way into the peer's memory."""

    mode: str

    def write(self, blocks: Blocks) -> None:
        """Copy the blocks; raise `OSError`, after which some bytes have landed."""

    def close(self) -> None:
        """Give up what the writer holds."""


class NoWriter:
    """For a peer that is only watched: every write is refused with the reason."""

    mode = "none"

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def write(self, blocks: Blocks) -> None:
        raise PermissionError(errno.EPERM, f"cannot move {blocks.nbytes} bytes: {self._reason}")

    def close(self) -> None:
        return


class VmWriter:
    """Writes with process_vm_writev(2), at most 1,024 blocks a system call."""

    mode = "vm"

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


class ShmWriter:
    """Writes into the peer's pools, mapped here; addresses are the peer's. The loop lets the GIL go for each block."""

    mode = "shm"

    def __init__(self, fds: Sequence[int], pools: Sequence[tuple[int, int]]) -> None:
        order = sorted(range(len(pools)), key=lambda i: pools[i][0])
        self._maps = [mmap.mmap(fds[i], pools[i][1], mmap.MAP_SHARED) for i in order]
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTFORK)  # a child of this process must not outlive it as a writer
        here = u64(ctypes.addressof(ctypes.c_char.from_buffer(mapped)) for mapped in self._maps)
        self._start = u64(pools[i][0] for i in order)
        self._stop = self._start + u64(pools[i][1] for i in order)
        self._shift: U64 = here - self._start  # wraps around, as the addition below does

    @classmethod
    def ask(cls, name: str, token: bytes, pools: Sequence[tuple[int, int]], uid: int) -> ShmWriter:
        """Return a writer into the pools [(address, nbytes)] of the process of user `uid` that listens at `name`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, contextlib.ExitStack() as opened:
            connection.settimeout(_HANDSHAKE_S)
            connection.connect("\0" + name)
            if _peer_uid(connection) != uid:
                raise TransportError("another user answers at its socket")
            connection.sendall(token)
            fds: list[int] = []
            while len(fds) < len(pools):
                data, received, _, _ = socket.recv_fds(connection, 1, _FDS_AT_A_TIME)
                for fd in received:
                    opened.callback(os.close, fd)
                if not data:
                    raise TransportError(f"it did not pass them on to uid {os.getuid()}; it is uid {uid}")
                fds += received
            return cls(fds, pools)

    def write(self, blocks: Blocks) -> None:
        index = np.maximum(np.searchsorted(self._start, blocks.dst, side="right"), 1) - 1
        if (blocks.dst + blocks.length > self._stop[index]).any():
            raise OSError("a block crosses the border of two shared pools")
        here = blocks.dst + self._shift[index]
        for to, source, length in zip(here.tolist(), blocks.src.tolist(), blocks.length.tolist(), strict=True):
            ctypes.memmove(to, source, length)

    def close(self) -> None:
        for mapped in self._maps:
            mapped.close()


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class PoolServer:
    """Passes the descriptors of shared pools to processes of the same user that know the token. Close it."""

    def __init__(self, name: str, token: bytes, pools: Sequence[Pool]) -> None:
        self._token = token
        self._fds = [pool.fd for pool in pools if pool.fd is not None]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + name)
        self._listener.listen(16)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvroom-local-pools", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop passing pools on. Who has mapped one keeps it."""
        self._closing.set()
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closing, or no descriptor left for the moment
                self._closing.wait(0.1)
                continue
            with connection, contextlib.suppress(OSError):  # a caller that hung up is its own affair
                connection.settimeout(_HANDSHAKE_S)
                self._pass_on(connection)

    def _pass_on(self, connection: socket.socket) -> None:
        token = connection.recv(len(self._token), socket.MSG_WAITALL)  # read first: a refusal is an end, not a reset
        if _peer_uid(connection) != os.getuid() or not hmac.compare_digest(token, self._token):
            return
        for start in range(0, len(self._fds), _FDS_AT_A_TIME):
            socket.send_fds(connection, [b"+"], self._fds[start : start + _FDS_AT_A_TIME])


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

"""Scatter and gather through the kernel: a list of segments as one NumPy array, and the calls that take such arrays.

`struct iovec` is {void *base; size_t len}, which on a 64-bit machine is the array uint64[n, 2]. ctypes releases the GIL
during each call. Calls return the number of bytes moved or raise `OSError`; see readv(2), sendmsg(2),
process_vm_writev(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvroom.plan.blocks import U64

IOV_MAX = 1024  # Linux: UIO_MAXIOV
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000

_libc = ctypes.CDLL(None, use_errno=True)


class _MsgHdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


for _name in ("sendmsg", "recvmsg"):
    _call = getattr(_libc, _name)
    _call.argtypes, _call.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t
for _name in ("process_vm_readv", "process_vm_writev"):
    _call = getattr(_libc, _name)
    _call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
    _call.restype = ctypes.c_ssize_t


def _raise() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


class Segments:
    """A list of memory segments that is consumed from the front, by the number of bytes that each call moved.

    It holds addresses, not memory: the owner must keep the memory alive until the list is consumed or dropped.
    """

    def __init__(self, address: U64, length: U64, head: bytes = b"") -> None:
        """Create the list. The bytes of `head`, which the list keeps alive, come before the segments."""
        self._head = head
        first = 1 if head else 0
        self._iov: npt.NDArray[np.uint64] = np.empty((address.size + first, 2), dtype=np.uint64)
        if head:
            self._iov[0] = np.frombuffer(head, np.uint8).__array_interface__["data"][0], len(head)
        self._iov[first:, 0] = address
        self._iov[first:, 1] = length
        self._ends: npt.NDArray[np.uint64] | None = None  # computed when a call stops in the middle, which is rare
        self._base: int = self._iov.__array_interface__["data"][0]
        self._index = 0
        self._moved = 0
        self.left = int(length.sum()) + len(head)

    def window(self) -> tuple[int, int]:
        """Return the address and count of the next segments, at most `IOV_MAX`, for the kernel."""
        return self._base + 16 * self._index, min(IOV_MAX, len(self._iov) - self._index)

    def advance(self, nbytes: int) -> None:
        """Drop `nbytes` from the front, shortening the segment in which they end."""
        self._moved += nbytes
        self.left -= nbytes
        if not self.left:
            self._index = len(self._iov)
            return
        if self._ends is None:
            self._ends = np.cumsum(self._iov[:, 1])  # no segment was shortened yet
        self._index = index = int(np.searchsorted(self._ends, np.uint64(self._moved), side="right"))
        row = self._iov[index]
        rest = int(self._ends[index]) - self._moved
        row[0] += row[1] - np.uint64(rest)
        row[1] = rest


class SocketCalls:
    """Non-blocking `sendmsg` and `recvmsg` on one stream socket, without SIGPIPE. For one thread at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._header = _MsgHdr()
        self._address = ctypes.addressof(self._header)

    def send(self, segments: Segments) -> int:
        """Send from the front of `segments`. Return the number of bytes sent, 0 if the socket is full now."""
        self._header.iov, self._header.iovlen = segments.window()
        return self._done(_libc.sendmsg(self._fd, self._address, _MSG_DONTWAIT | _MSG_NOSIGNAL), segments)

    def receive(self, segments: Segments) -> int | None:
        """Fill the front of `segments`. Return the bytes received, 0 if none are available, None at end of stream."""
        self._header.iov, self._header.iovlen = segments.window()
        moved: int = _libc.recvmsg(self._fd, self._address, _MSG_DONTWAIT)
        return None if moved == 0 else self._done(moved, segments)

    @staticmethod
    def _done(moved: int, segments: Segments) -> int:
        if moved < 0:
            if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                _raise()
            return 0
        segments.advance(moved)
        return moved


def copy_to_process(pid: int, local: Segments, remote: Segments) -> None:
    """Write all of `local` to `remote` in process `pid`; equal sizes. After an error, some bytes may be written."""
    _copy(_libc.process_vm_writev, pid, local, remote)


def copy_from_process(pid: int, local: Segments, remote: Segments) -> None:
    """Read all of `remote` in process `pid` into `local`; equal sizes."""
    _copy(_libc.process_vm_readv, pid, local, remote)


def _copy(call: Callable[..., int], pid: int, local: Segments, remote: Segments) -> None:
    while local.left:
        moved = call(pid, *local.window(), *remote.window(), 0)
        if moved <= 0:
            _raise()
        local.advance(moved)
        remote.advance(moved)

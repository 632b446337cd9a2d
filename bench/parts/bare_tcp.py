"""Loopback TCP driven bare: blocking writev(2) and readv(2) straight from and into the blocks, 1,024 a call.

There are no frames, because both ends have the plan. The sink answers each transfer with one byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable

from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.data_handshake import tune
from kvroom.transports.kit.iovec import Segments
from kvroom.transports.kit.pool import Pool
from parts.ends import End, Way

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.readv, _libc.writev):
    _call.argtypes, _call.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t


class BareTcp(End):
    """One end of a TCP connection: the sink listens, the source connects."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._listener = socket.create_server(("127.0.0.1", 0))
        tune(self._listener)
        self._socket: socket.socket | None = None

    def card(self) -> bytes:
        return b"" if self._socket else str(self._listener.getsockname()[1]).encode()

    def meet(self, card: bytes) -> None:
        if card:
            self._socket = socket.create_connection(("127.0.0.1", int(card)))
        else:
            self._socket, _ = self._listener.accept()
        tune(self._socket)

    def move(self, blocks: Blocks, way: Way) -> None:  # noqa: ARG002
        assert self._socket is not None
        _pump(_libc.writev, self._socket.fileno(), Segments(blocks.src, blocks.length))
        if self._socket.recv(1) != b"+":
            raise EOFError("the sink ended")

    def take(self, blocks: Blocks) -> None:
        assert self._socket is not None
        _pump(_libc.readv, self._socket.fileno(), Segments(blocks.dst, blocks.length))
        self._socket.sendall(b"+")

    def close(self) -> None:
        with contextlib.closing(self._listener):
            if self._socket is not None:
                self._socket.close()


def _pump(call: Callable[[int, int, int], int], fd: int, segments: Segments) -> None:
    """Call readv or writev until all segments are done."""
    while segments.left:
        moved = call(fd, *segments.window())
        if moved <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        segments.advance(moved)

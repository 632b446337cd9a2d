"""The system call of `local` driven bare: process_vm_writev(2), 1,024 blocks a call, from one or more threads."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os

import numpy as np

from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.kit.pool import Pool
from parts.ends import End, Way

WAYS = [Way(1024, 1), Way(1024, 2)]  # `depth`: threads
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, ctypes.c_ulong(-1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.process_vm_writev.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


class BareLocal(End):
    """One end that writes with process_vm_writev(2). Its card is the process id."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        # Without Yama the kernel refuses this call, and the writer needs no permission then.
        _libc.prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
        self._threads = concurrent.futures.ThreadPoolExecutor(2)
        self._peer = 0

    def card(self) -> bytes:
        return str(os.getpid()).encode()

    def meet(self, card: bytes) -> None:
        self._peer = int(card)

    def move(self, blocks: Blocks, way: Way) -> None:
        count = blocks.length.size
        local, remote = (np.stack((address, blocks.length), axis=1) for address in (blocks.src, blocks.dst))
        if way.depth == 1 or count < way.depth:
            self._write(local, remote, way.blocks)
            return
        share = -(-count // way.depth)
        parts = [slice(start, start + share) for start in range(0, count, share)]
        for done in [self._threads.submit(self._write, local[part], remote[part], way.blocks) for part in parts]:
            done.result()

    def _write(self, local: U64, remote: U64, most: int) -> None:
        row_bytes = local.strides[0]
        for start in range(0, len(local), most):
            n, at = min(most, len(local) - start), start * row_bytes
            wanted = int(local[start : start + n, 1].sum())
            moved = _libc.process_vm_writev(self._peer, local.ctypes.data + at, n, remote.ctypes.data + at, n, 0)
            if moved != wanted:
                raise OSError(ctypes.get_errno(), f"{moved} of {wanted} bytes were written")

    def close(self) -> None:
        self._threads.shutdown()

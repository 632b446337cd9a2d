"""Ends of `local` with GPU memory: hosts for the conformance suite and for tests of two processes.

The GPUs are those of the double, or of a library with the calls of libcuda.so.1: NVIDIA's, or the stub that
`libcuda_stub.c` makes. As a program, `cuda_helpers.py FD` serves an end as `kvroom.conformance.ends` does.
CUDAKIT_PLACES lists the devices on which its pools lie, in turn ("cuda:0,cpu"); CUDAKIT_LIBRARY names the library, if
it is not the double.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from kvroom.conformance import ends
from kvroom.conformance.ends import ANSWER_S, Host, Hosts
from kvroom.conformance.stage import Skipped
from kvroom.conformance.suite import Case, Check, run
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.pool import Pool, allocate
from kvroom.transports.kit.ranges import u64
from kvroom.transports.local import LocalOptions, LocalTransport
from kvroom.transports.local import cuda_driver as real
from kvroom.transports.local.cuda import Gpus, ordinal
from kvroom_lab.doubles import cuda_driver as double

DOUBLE, REAL = double.__name__, real.__name__
PLACED = "cuda_helpers:Placed"
_library = os.environ.get("CUDAKIT_LIBRARY", "")
_module = REAL if _library else DOUBLE


class Placed(LocalTransport):
    """`local` that detects the device of each range itself, for an end that does not pass it on."""

    def __init__(self, options: LocalOptions | None = None) -> None:
        super().__init__(msgspec.structs.replace(options or LocalOptions(), cuda=_module))

    def register(self, memory: Sequence[MemoryRange]) -> None:
        super().register([each._replace(device=self._place(each.address)) for each in memory])

    def _place(self, address: int) -> str:
        try:
            with self._gpus.using(0) as driver:
                return f"cuda:{driver.device_of(address)}"
        except real.CudaError:
            return "cpu"


class DoublePool:
    """The interface of a pool that `ends` uses, on a GPU of the double. The memory is freed with it."""

    def __init__(self, device: int, nbytes: int) -> None:
        self._memory = double.allocate(device, nbytes)
        self.address, self.nbytes = self._memory.address, nbytes
        weakref.finalize(self, double.free, self._memory)

    @property
    def buffer(self) -> memoryview:
        return self._memory.buffer

    def load(self) -> None:
        """Do nothing: `buffer` is the memory itself."""

    store = load


class LibraryPool:
    """A pool from cuMemAlloc: `load` copies it to `buffer`, `store` copies `buffer` to it."""

    def __init__(self, device: int, nbytes: int) -> None:
        self._device, self._gpus, self.nbytes = device, Gpus(REAL), nbytes
        self._host = np.zeros(nbytes, np.uint8)
        base = ctypes.c_uint64()
        with self._gpus.using(device):
            code = ctypes.CDLL(_library).cuMemAlloc_v2(ctypes.byref(base), ctypes.c_size_t(nbytes))
        assert code == 0, f"cuMemAlloc: {code}"
        self.address = base.value
        weakref.finalize(self, _free, self._gpus, device, base.value)

    @property
    def buffer(self) -> memoryview:
        return self._host.data

    def load(self) -> None:
        self._gpus.copy(self._device, "dtoh", self._all(self.address, self._host.ctypes.data))

    def store(self) -> None:
        self._gpus.copy(self._device, "htod", self._all(self._host.ctypes.data, self.address))

    def _all(self, src: int, dst: int) -> Blocks:
        return Blocks(u64([src]), u64([dst]), u64([self.nbytes]))


def _free(gpus: Gpus, device: int, address: int) -> None:
    with gpus.using(device):
        ctypes.CDLL(_library).cuMemFree_v2(ctypes.c_uint64(address))
    gpus.close()


class CudaWorker(ends._Worker):
    """An end whose pools are loaded before they are read and stored after they are filled."""

    _pools: list[Any]

    def open(self, setup: Sequence[Any]) -> None:
        super().open(setup)
        self._each("store")

    def fill(self, value: int) -> None:
        super().fill(value)
        self._each("store")

    def contents(self, index: int) -> bytes:
        self._each("load")
        return super().contents(index)

    def touched(self, value: int, watch_s: float) -> int:
        self._each("load")
        return super().touched(value, watch_s)

    def _each(self, what: str) -> None:
        for pool in self._pools:
            if not isinstance(pool, Pool):
                getattr(pool, what)()


class CudaHost(Host):
    """A process that serves ends with pools on these devices, in turn.

    Without a `library` it sees the `gpus` of the double's imaginary machine; pairs in `no_peers` have no peer access.
    """

    def __init__(self, places: str = "cuda:0", *, gpus: str = "0,1", no_peers: str = "", library: str = "") -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(ANSWER_S)
        own = {"KVROOM_DOUBLE_GPUS": gpus, "KVROOM_DOUBLE_NO_PEERS": no_peers}
        own |= {"CUDAKIT_PLACES": places, "CUDAKIT_LIBRARY": library}
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | own)


class CudaHosts(Hosts):
    """Hosts for the suite: every new host has its pools on the next of these lists of devices."""

    def __init__(self, *places: str, library: str = "") -> None:
        super().__init__()
        self._places, self._library = itertools.cycle(places), library

    def want(self, count: int) -> None:
        self._idle += [self._new() for _ in range(count - len(self._idle))]

    def take(self) -> Host:
        return self._idle.pop(0) if self._idle else self._new()

    def _new(self) -> Host:
        return CudaHost(next(self._places), library=self._library)


def judge(check: Check, hosts: CudaHosts) -> None:
    """Run one check of the conformance suite; skip it, with its reason, where it is not possible."""
    try:
        run(check, Case(PLACED), hosts)
    except Skipped as reason:
        pytest.skip(str(reason))


def _serve(connection: socket.socket) -> None:
    places = itertools.cycle(os.environ["CUDAKIT_PLACES"].split(","))

    def place(nbytes: int, *, shared: bool = False, huge: bool = True) -> Pool | DoublePool | LibraryPool:
        device = ordinal(next(places))
        if device is None:
            return allocate(nbytes, shared=shared, huge=huge)
        return LibraryPool(device, nbytes) if _library else DoublePool(device, nbytes)

    if _library:
        real._LIBRARY = _library
    ends.allocate = place  # type: ignore[attr-defined, assignment]
    ends._Worker = CudaWorker  # type: ignore[misc]
    ends._serve(connection)


if __name__ == "__main__":
    sys.modules["cuda_helpers"] = sys.modules["__main__"]  # one `Placed`, not two
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)

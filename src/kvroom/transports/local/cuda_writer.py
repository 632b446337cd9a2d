"""Writes into a peer's GPU memory, and from this side's GPU memory into a peer's host: CUDA IPC beside `vm` or `shm`.

| from \\ to | peer's host | peer's GPU |
| --- | --- | --- |
| this host | `vm` or `shm` | a copy into the mapped allocation |
| this GPU | a copy into a buffer here, then `vm` or `shm` | a copy into the mapped allocation |

The peer's allocations are mapped in the context of the GPU that the blocks are read from. If the two GPUs have peer
access, that need not be the GPU that the allocations are on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.devices import Devices, by_device, kind_of

from .cuda import CudaAllocation, Gpus, ordinal
from .cuda_driver import CudaDriver, CudaError
from .writers import Mapped, Writer

_NOT_OPENED = (
    "run both workers in one container, or in containers that share GPUs and IPC namespace, on GPUs with peer access "
    "to each other (nvidia-smi topo -p2p w); or choose a transport such as nixl"
)


class _Window(NamedTuple):
    """The peer's allocations as mapped in the context of one local GPU. Those in `opened` must be closed there."""

    device: int
    memory: Mapped
    opened: tuple[int, ...]


class Windows:
    """A peer's GPU memory, opened in the context of each local GPU that holds registered memory.

    A process without such memory opens each allocation on the GPU that the allocation is on.
    """

    def __init__(
        self, gpus: Gpus, own: Sequence[int], allocations: Sequence[CudaAllocation], same_process: bool
    ) -> None:
        """Map the allocations. Those of the calling process itself need no mapping.

        Raises:
            OSError: The driver is missing or refused a call. Nothing is mapped then.
            TransportError: A GPU is not visible, or an allocation cannot be opened. Nothing is mapped then.
        """
        self._gpus = gpus
        self._windows: list[_Window] = []
        places: list[tuple[int, Sequence[CudaAllocation]]] = [(device, allocations) for device in own]
        for gpu in () if own else dict.fromkeys(allocation.gpu for allocation in allocations):
            seen = gpus.seen(gpu)
            if seen is None:
                raise TransportError(
                    f"local: the peer's GPU {gpu.hex()} is not among those that this process sees: add it to "
                    "CUDA_VISIBLE_DEVICES"
                )
            places.append((seen, [allocation for allocation in allocations if allocation.gpu == gpu]))
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for device, wanted in places:
                with gpus.using(device) as driver:
                    opened = () if same_process else _open(driver, device, wanted)
                pieces = [(allocation.base, allocation.nbytes) for allocation in wanted]
                mapped = Mapped(pieces, opened or [base for base, _ in pieces])
                self._windows.append(_Window(device, mapped, opened))
            undo.pop_all()

    def write(self, device: int | None, blocks: Blocks) -> None:
        """Copy blocks into the peer's memory from the local GPU `device`, or from host memory if it is None.

        Raise `OSError` on failure; some of the blocks may have landed then.
        """
        first = int(blocks.dst[0])
        window = next(w for w in self._windows if (w.memory.covers(first) if device is None else w.device == device))
        here = Blocks(blocks.src, window.memory.translate(blocks), blocks.length)
        self._gpus.copy(window.device, "htod" if device is None else "dtod", here)

    def close(self) -> None:
        """Close all handles. No copy through them may be in flight."""
        for window in self._windows:
            with contextlib.suppress(CudaError), self._gpus.using(window.device) as driver:  # the context may be lost
                for base in window.opened:
                    driver.close(base)
        self._windows = []


def _open(driver: CudaDriver, device: int, wanted: Sequence[CudaAllocation]) -> tuple[int, ...]:
    opened: list[int] = []
    for allocation in wanted:
        try:
            opened.append(driver.open(allocation.handle))
        except CudaError as error:
            for base in opened:
                driver.close(base)
            raise TransportError(
                f"local: memory of the peer's GPU {allocation.gpu.hex()} cannot be opened on cuda:{device} ({error}): "
                f"{_NOT_OPENED}"
            ) from error
    return tuple(opened)


class DeviceWriter:
    """The writer for two ends of which at least one has GPU memory. `host` writes to the peer's host memory."""

    waits = True

    def __init__(self, gpus: Gpus, here: Devices, there: Devices, host: Writer, windows: Windows) -> None:
        self._gpus, self._here, self._there, self._host, self._windows = gpus, here, there, host, windows
        self.mode = "cuda" if host.mode == "none" else f"{host.mode}+cuda"

    def write(self, blocks: Blocks) -> None:
        for source, sink, part in by_device(blocks, self._here, self._there):
            device = ordinal(source)
            if kind_of(sink) == "cuda":
                self._windows.write(device, part)
            elif device is None:
                self._host.write(part)
            else:
                # The driver cannot write into another process's host memory: copy to a buffer here, then from there.
                buffer = np.empty(part.nbytes, np.uint8)
                at = np.cumsum(part.length) - part.length + np.uint64(buffer.ctypes.data)
                self._gpus.copy(device, "dtoh", Blocks(part.src, at, part.length))
                self._host.write(Blocks(at, part.dst, part.length))

    def close(self) -> None:
        self._windows.close()
        self._host.close()

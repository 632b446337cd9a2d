"""This process's GPUs, as `local` uses them: copies, and handles by which other processes open memory (CUDA IPC).

The law: no copy is in flight once `copy` has returned or raised, because it waits for the stream of the copy. A context
that is made current in a thread is popped again before the call returns, so the engine's own contexts stay as they are.

A handle stands for a whole allocation, so the description lists allocations; a peer still writes only to the registered
ranges. GPUs are identified by UUID, because CUDA_VISIBLE_DEVICES gives a GPU another number in each process.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import Blocks, MemoryRange

from .cuda_driver import HANDLE_BYTES, UUID_BYTES, CudaDriver, CudaError

_NOT_SHARED = (
    "allocate it with cudaMalloc: with PyTorch, remove expandable_segments and backend:cudaMallocAsync from "
    "PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF, because their memory has no handle; or choose a transport such as "
    "nixl"
)
_NO_DRIVER = "let this process see a GPU and NVIDIA's driver (in a container: --gpus), or keep the KV pool on the host"

NonNegative = Annotated[int, Meta(ge=0)]


class CudaAllocation(msgspec.Struct, frozen=True, array_like=True):
    """An allocation that peers may open: UUID of its GPU, start and size in its owner's addresses, IPC handle."""

    gpu: Annotated[bytes, Meta(min_length=UUID_BYTES, max_length=UUID_BYTES)]
    base: NonNegative
    nbytes: NonNegative
    handle: Annotated[bytes, Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]


class Gpus:
    """One transport's use of the CUDA driver, which is loaded on first use. May be used from any thread."""

    def __init__(self, module: str) -> None:
        """Import the module that has the class `CudaDriver`: the real one, or a double.

        Raises:
            ConfigurationError: There is no such module, or it has no such class.
        """
        try:
            self._make: type[CudaDriver] = importlib.import_module(module).CudaDriver
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(
                f"local: cuda={module!r} is not a module with a class CudaDriver: {error}"
            ) from error
        self._lock = threading.Lock()
        self._driver: CudaDriver | None = None
        self._contexts: dict[int, int] = {}
        self._idle: dict[int, list[int]] = {}
        self._streams: list[tuple[int, int]] = []

    def driver(self) -> CudaDriver:
        """Return the driver, and load it on first use. Raise `OSError` if there is none."""
        with self._lock:
            if self._driver is None:
                self._driver = self._make()
            return self._driver

    @contextlib.contextmanager
    def using(self, device: int) -> Iterator[CudaDriver]:
        """Make the device's primary context current in this thread for the duration of the `with` block."""
        driver = self.driver()
        with self._lock:
            if device not in self._contexts:
                self._contexts[device] = driver.retain(device)
        driver.push(self._contexts[device])
        try:
            yield driver
        finally:
            driver.pop()

    def copy(self, device: int, way: str, blocks: Blocks) -> None:
        """Copy the blocks in the context of `device`, and wait until the copies have completed.

        `way` is that of `CudaDriver.copy`. Raise `CudaError` if the driver refuses a copy; some of the copies may have
        completed then.
        """
        with self.using(device) as driver:
            with self._lock:
                idle = self._idle.setdefault(device, [])
                if idle:
                    stream = idle.pop()
                else:
                    stream = driver.stream()
                    self._streams.append((device, stream))
            try:
                driver.copy(way, blocks, stream)
            finally:
                driver.wait(stream)  # after an error, copies that were started may still be running
            with self._lock:
                self._idle[device].append(stream)

    def export(self, memory: Iterable[MemoryRange]) -> tuple[CudaAllocation, ...]:
        """Return the allocations that contain these ranges. Raise `ConfigurationError` if one cannot be shared."""
        found: dict[int, CudaAllocation] = {}
        for piece in memory:
            device = ordinal(piece.device)
            try:
                count = self.driver().count()
                if device is None or device >= count:
                    raise ConfigurationError(
                        f"local: device {piece.device!r}: name one of the {count} GPUs here, cuda:0 and so on"
                    )
                with self.using(device) as driver:
                    real = driver.device_of(piece.address)
                    if f"cuda:{real}" != piece.device:
                        raise ConfigurationError(f"local: {piece} is on cuda:{real}: correct the device of the region")
                    at = piece.address
                    while at < piece.address + piece.nbytes:
                        base, nbytes = driver.allocation(at)
                        if base not in found:
                            found[base] = CudaAllocation(driver.uuid(real), base, nbytes, driver.export(base))
                        at = base + nbytes
            except OSError as error:
                raise ConfigurationError(
                    f"local: the {piece.nbytes} bytes at {piece.address:#x} on {piece.device!r} cannot be shared with "
                    f"another process ({error}): {_NO_DRIVER if self._driver is None else _NOT_SHARED}"
                ) from error
        return tuple(found.values())

    def seen(self, gpu: bytes) -> int | None:
        """Return the ordinal of the GPU with this UUID, or None if this process does not see it."""
        driver = self.driver()
        return next((device for device in range(driver.count()) if driver.uuid(device) == gpu), None)

    def close(self) -> None:
        """Release streams and contexts. No copy may be in flight, and no peer's memory mapped."""
        for device, stream in self._streams:
            with contextlib.suppress(CudaError), self.using(device) as driver:  # a lost context has no streams
                driver.destroy(stream)
        for device in self._contexts:
            with contextlib.suppress(CudaError):
                self.driver().release(device)
        self._streams, self._contexts, self._idle = [], {}, {}


def ordinal(device: str) -> int | None:
    """Return N for "cuda:N", and None for any other device."""
    kind, _, number = device.partition(":")
    return int(number) if kind == "cuda" and number.isdecimal() else None

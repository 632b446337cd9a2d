"""A double of the CUDA driver for `local`, without GPU and NVIDIA driver: it moves bytes of host memory.

"GPU memory" is a memfd, which other processes open by a handle, as they would an allocation. Its device address is a
reservation without access rights, so code that touches GPU memory without the driver crashes, as it should. Copies
happen in `wait`, not in `copy`, so code that does not wait has moved nothing. The double refuses what the driver
refuses, with the same CUresult, and a call needs a current context where the driver's does.

Environment of a process: `KVROOM_DOUBLE_GPUS` lists the GPUs of the imaginary machine that the process sees, in its
order ("0,1" if unset; none if empty); `KVROOM_DOUBLE_NO_PEERS` lists pairs of GPUs without peer access ("0-1").
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import struct
import threading
from typing import NamedTuple

from kvroom.plan.blocks import Blocks
from kvroom.transports.local.cuda_driver import CudaError

INVALID_VALUE, NO_DEVICE, INVALID_DEVICE, INVALID_CONTEXT = 1, 100, 101, 201
PEER_ACCESS_UNSUPPORTED, INVALID_HANDLE, NOT_FOUND = 217, 400, 500
_NAMES = {
    INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE",
    NO_DEVICE: "CUDA_ERROR_NO_DEVICE",
    INVALID_DEVICE: "CUDA_ERROR_INVALID_DEVICE",
    INVALID_CONTEXT: "CUDA_ERROR_INVALID_CONTEXT",
    PEER_ACCESS_UNSUPPORTED: "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
    INVALID_HANDLE: "CUDA_ERROR_INVALID_HANDLE",
    NOT_FOUND: "CUDA_ERROR_NOT_FOUND",
}
_HANDLE = struct.Struct("<8siiQQQ24x")  # magic, pid, descriptor, inode, bytes, GPU
_MAGIC = b"cudafake"
_CONTEXT = 0xC0DE0000  # plus the device: its primary context
_PROT_NONE, _MAP_NORESERVE, _MAP_FAILED = 0, 0x4000, ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _refuse(call: str, code: int, why: str) -> CudaError:
    return CudaError(call, code, f"{_NAMES[code]} ({code}), {why} (double of the CUDA driver)")


class Memory:
    """One allocation as this process sees it: `address` for the device, `buffer` for the code that plays the GPU."""

    def __init__(self, fd: int, nbytes: int, gpu: int, exportable: bool) -> None:
        self.fd, self.nbytes, self.gpu, self.exportable = fd, nbytes, gpu, exportable
        self.opened = 0  # times that `CudaDriver.open` opened it; 0: allocated by this process
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
        self.real = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = int(
            _libc.mmap(None, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        )
        if self.address == _MAP_FAILED:
            raise MemoryError(os.strerror(ctypes.get_errno()))

    @property
    def buffer(self) -> memoryview:
        """Return all of its bytes, writable."""
        return memoryview(self._map)

    def drop(self) -> None:
        """Unmap it. Raise `BufferError` while a view of `buffer` exists."""
        self._map.close()
        os.close(self.fd)
        _libc.munmap(self.address, self.nbytes)


class _Copy(NamedTuple):
    to: int
    source: int
    nbytes: int


class _Stream:
    def __init__(self, context: int) -> None:
        self.context = context
        self.begun: list[_Copy] = []


class _Machine:
    """The driver's state for this process, shared by all `CudaDriver` objects."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: dict[int, Memory] = {}  # by device address
        self.opened: dict[tuple[int, bytes], Memory] = {}  # by context and handle
        self.streams: dict[int, _Stream] = {}
        self.retained: dict[int, int] = {}  # by device
        self.numbers = itertools.count(1)
        self.threads = threading.local()

    def stack(self) -> list[int]:
        """Return the contexts that this thread has pushed."""
        if not hasattr(self.threads, "stack"):
            self.threads.stack = []
        stack: list[int] = self.threads.stack
        return stack

    def find(self, address: int) -> Memory | None:
        """Return the allocation, of this process or opened, that contains a device address; None if there is none."""
        with self.lock:
            held = self.memory.values()
            return next((each for each in held if each.address <= address < each.address + each.nbytes), None)


_machine = _Machine()


def _visible() -> list[int]:
    return [int(gpu) for gpu in os.environ.get("KVROOM_DOUBLE_GPUS", "0,1").split(",") if gpu]


def _peers(one: int, other: int) -> bool:
    apart = os.environ.get("KVROOM_DOUBLE_NO_PEERS", "").split(",")
    return f"{one}-{other}" not in apart and f"{other}-{one}" not in apart


def allocate(device: int, nbytes: int, *, exportable: bool = True) -> Memory:
    """Return zeroed memory on a GPU, as from cuMemAlloc; without `exportable`, as from cuMemCreate."""
    fd = os.memfd_create("kvroom-double-gpu")
    os.ftruncate(fd, nbytes)
    memory = Memory(fd, nbytes, _visible()[device], exportable)
    with _machine.lock:
        _machine.memory[memory.address] = memory
    return memory


def free(memory: Memory) -> None:
    """Free memory of `allocate`; its handle opens nothing after that. Raise `BufferError` while a view of it exists."""
    with _machine.lock:
        memory.drop()
        del _machine.memory[memory.address]


def held() -> tuple[int, int, int]:
    """Return the numbers of retained contexts, live streams and opened allocations in this process."""
    with _machine.lock:
        return sum(_machine.retained.values()), len(_machine.streams), len(_machine.opened)


class CudaDriver:
    """The calls and arguments of `kvroom.transports.local.cuda_driver.CudaDriver`; a test compares them."""

    def __init__(self) -> None:
        if not _visible():
            raise _refuse("cuInit", NO_DEVICE, "no CUDA-capable device is detected")

    def count(self) -> int:
        return len(_visible())

    def uuid(self, device: int) -> bytes:
        return b"double of gpu %02d" % _visible()[self._known("cuDeviceGetUuid_v2", device)]

    def retain(self, device: int) -> int:
        with _machine.lock:
            count = _machine.retained.get(self._known("cuDevicePrimaryCtxRetain", device), 0)
            _machine.retained[device] = count + 1
        return _CONTEXT + device

    def release(self, device: int) -> None:
        with _machine.lock:
            if not _machine.retained.get(device):
                raise _refuse("cuDevicePrimaryCtxRelease_v2", INVALID_CONTEXT, "it is not retained")
            _machine.retained[device] -= 1

    def push(self, context: int) -> None:
        if not _machine.retained.get(context - _CONTEXT):
            raise _refuse("cuCtxPushCurrent_v2", INVALID_CONTEXT, "the context is not retained")
        _machine.stack().append(context)

    def pop(self) -> None:
        self._current("cuCtxPopCurrent_v2")
        _machine.stack().pop()

    def allocation(self, address: int) -> tuple[int, int]:
        self._current("cuMemGetAddressRange_v2")
        memory = _machine.find(address)
        if memory is None:
            raise _refuse("cuMemGetAddressRange_v2", NOT_FOUND, f"{address:#x} is in no allocation")
        return memory.address, memory.nbytes

    def device_of(self, address: int) -> int:
        memory = _machine.find(address)
        if memory is None:
            raise _refuse("cuPointerGetAttribute", INVALID_VALUE, f"{address:#x} is not a device pointer")
        return _visible().index(memory.gpu)

    def export(self, base: int) -> bytes:
        self._current("cuIpcGetMemHandle")
        memory = _machine.memory.get(base)
        if memory is None or memory.opened or not memory.exportable:
            raise _refuse(
                "cuIpcGetMemHandle", INVALID_VALUE, f"{base:#x} is not the base of an allocation by cuMemAlloc"
            )
        return _HANDLE.pack(_MAGIC, os.getpid(), memory.fd, os.fstat(memory.fd).st_ino, memory.nbytes, memory.gpu)

    def open(self, handle: bytes) -> int:
        context = self._current("cuIpcOpenMemHandle_v2")
        with _machine.lock:
            memory = _machine.opened.get((context, handle))
            if memory is None:
                memory = _open(handle, _visible()[context - _CONTEXT])
                _machine.memory[memory.address] = _machine.opened[context, handle] = memory
            memory.opened += 1
        return memory.address

    def close(self, base: int) -> None:
        context = self._current("cuIpcCloseMemHandle")
        with _machine.lock:
            key = next((key for key, each in _machine.opened.items() if each.address == base), None)
            if key is None or key[0] != context:
                raise _refuse("cuIpcCloseMemHandle", INVALID_VALUE, f"{base:#x} was not opened in this context")
            memory = _machine.opened[key]
            memory.opened -= 1
            if not memory.opened:
                del _machine.opened[key], _machine.memory[base]
                memory.drop()

    def stream(self) -> int:
        context = self._current("cuStreamCreate")
        with _machine.lock:
            number = next(_machine.numbers)
            _machine.streams[number] = _Stream(context)
        return number

    def destroy(self, stream: int) -> None:
        self._streaming("cuStreamDestroy_v2", stream)
        del _machine.streams[stream]

    def copy(self, way: str, blocks: Blocks, stream: int) -> None:
        begun = self._streaming(f"copy {way}", stream).begun
        for to, source, nbytes in zip(blocks.dst.tolist(), blocks.src.tolist(), blocks.length.tolist(), strict=True):
            begun.append(_Copy(_real(to, nbytes, way[3] == "d"), _real(source, nbytes, way[0] == "d"), nbytes))

    def wait(self, stream: int) -> None:
        found = self._streaming("cuStreamSynchronize", stream)
        begun, found.begun = found.begun, []
        for each in begun:
            ctypes.memmove(each.to, each.source, each.nbytes)

    def _known(self, call: str, device: int) -> int:
        if not 0 <= device < len(_visible()):
            raise _refuse(call, INVALID_DEVICE, f"there is no device {device}")
        return device

    def _current(self, call: str) -> int:
        stack = _machine.stack()
        if not stack:
            raise _refuse(call, INVALID_CONTEXT, "this thread has no current context")
        return stack[-1]

    def _streaming(self, call: str, stream: int) -> _Stream:
        context, found = self._current(call), _machine.streams.get(stream)
        if found is None or found.context != context:
            raise _refuse(call, INVALID_HANDLE, "the stream is not of the current context")
        return found


def _open(handle: bytes, gpu: int) -> Memory:
    magic, pid, fd, inode, nbytes, owner = _HANDLE.unpack(handle)
    call = "cuIpcOpenMemHandle_v2"
    if magic == _MAGIC and pid == os.getpid():
        raise _refuse(call, INVALID_CONTEXT, "the handle is of this process")
    if owner != gpu and not _peers(owner, gpu):
        raise _refuse(call, PEER_ACCESS_UNSUPPORTED, f"GPU {gpu} has no access to GPU {owner}")
    try:
        mine = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _refuse(call, INVALID_HANDLE, f"the memory no longer exists: {error}") from error
    if magic != _MAGIC or os.fstat(mine).st_ino != inode:
        os.close(mine)
        raise _refuse(call, INVALID_HANDLE, "the descriptor belongs to other memory now")
    return Memory(mine, nbytes, owner, False)


def _real(address: int, nbytes: int, on_device: bool) -> int:
    """Return the host address at which the bytes of a device address, or of a host address, can be accessed."""
    memory = _machine.find(address)
    if not on_device:
        if memory is not None:
            raise _refuse("copy", INVALID_VALUE, f"{address:#x} is a device pointer")
        return address
    if memory is None or address + nbytes > memory.address + memory.nbytes:
        raise _refuse("copy", INVALID_VALUE, f"[{address:#x}, {address + nbytes:#x}) is not inside one allocation")
    return memory.real + address - memory.address

"""The calls of NVIDIA's driver that `local` needs, through ctypes. Requires libcuda.so.1 only, not the CUDA toolkit.

`CudaDriver` is the complete interface, which a double has to implement. A call that needs a current context uses the
one that its thread has pushed. `copy` only starts copies; they have completed when `wait` returns. ctypes releases the
GIL during each call. See "CUDA Driver API", NVIDIA.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

from kvroom.plan.blocks import Blocks

_LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64
UUID_BYTES = 16
_LAZY_ENABLE_PEER_ACCESS = 1
_NON_BLOCKING = 1
_DEVICE_ORDINAL = 9
_address, _context, _stream = c_uint64, c_void_p, c_void_p


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


# The symbols to which the toolkit's header maps these calls. Drivers from 11.4 on have all of them.
_CALLS = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetUuid_v2": (c_char_p, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(_context), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (_context,),
    "cuCtxPopCurrent_v2": (POINTER(_context),),
    "cuMemGetAddressRange_v2": (POINTER(_address), POINTER(c_size_t), _address),
    "cuPointerGetAttribute": (c_void_p, c_int, _address),
    "cuIpcGetMemHandle": (POINTER(_Handle), _address),
    "cuIpcOpenMemHandle_v2": (POINTER(_address), _Handle, c_uint),
    "cuIpcCloseMemHandle": (_address,),
    "cuStreamCreate": (POINTER(_stream), c_uint),
    "cuStreamDestroy_v2": (_stream,),
    "cuStreamSynchronize": (_stream,),
    "cuMemcpyAsync": (_address, _address, c_size_t, _stream),
    "cuMemcpyHtoDAsync_v2": (_address, c_void_p, c_size_t, _stream),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _address, c_size_t, _stream),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
_COPIES = {"dtod": "cuMemcpyAsync", "htod": "cuMemcpyHtoDAsync_v2", "dtoh": "cuMemcpyDtoHAsync_v2"}


class CudaError(OSError):
    """The driver refused a call. `code` is its CUresult."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call}: {text}")
        self.code = code


class CudaDriver:
    """The driver, loaded into this process. Every method raises `CudaError` if the driver refuses the call.

    A device is its ordinal among those that this process sees.
    """

    def __init__(self) -> None:
        """Load and initialise the driver. Raise `OSError` if there is no driver or no device."""
        library = ctypes.CDLL(_LIBRARY)
        try:
            self._functions = {name: getattr(library, name) for name in _CALLS}
        except AttributeError as error:
            raise OSError(f"the NVIDIA driver here is older than 11.4: {error}") from error
        for name, arguments in _CALLS.items():
            self._functions[name].argtypes, self._functions[name].restype = arguments, c_int
        self._call("cuInit", 0)

    def count(self) -> int:
        """Return the number of devices."""
        number = c_int()
        self._call("cuDeviceGetCount", number)
        return number.value

    def uuid(self, device: int) -> bytes:
        """Return the 16 bytes that identify the device in every process."""
        raw = ctypes.create_string_buffer(UUID_BYTES)
        self._call("cuDeviceGetUuid_v2", raw, device)
        return raw.raw

    def retain(self, device: int) -> int:
        """Return the device's primary context, which the engine uses too. Each call needs one call of `release`."""
        context = _context()
        self._call("cuDevicePrimaryCtxRetain", context, device)
        return context.value or 0

    def release(self, device: int) -> None:
        """Release the primary context."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    def push(self, context: int) -> None:
        """Push the context on this thread's stack of contexts, which makes it current."""
        self._call("cuCtxPushCurrent_v2", context)

    def pop(self) -> None:
        """Pop the current context, which restores the one before the last `push`."""
        self._call("cuCtxPopCurrent_v2", _context())

    def allocation(self, address: int) -> tuple[int, int]:
        """Return the base and size of the allocation that contains the address."""
        base, nbytes = _address(), c_size_t()
        self._call("cuMemGetAddressRange_v2", base, nbytes, address)
        return base.value, nbytes.value

    def device_of(self, address: int) -> int:
        """Return the device that the address is on."""
        device = c_int()
        self._call("cuPointerGetAttribute", ctypes.byref(device), _DEVICE_ORDINAL, address)
        return device.value

    def export(self, base: int) -> bytes:
        """Return a 64-byte handle by which other processes can open the allocation that starts at `base`."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", handle, base)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation into the current context, and return its address here."""
        base = _address()
        self._call("cuIpcOpenMemHandle_v2", base, _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS)
        return base.value

    def close(self, base: int) -> None:
        """Unmap an allocation that `open` returned, in the same context."""
        self._call("cuIpcCloseMemHandle", base)

    def stream(self) -> int:
        """Return a stream of the current context that does not wait for the engine's default stream."""
        stream = _stream()
        self._call("cuStreamCreate", stream, _NON_BLOCKING)
        return stream.value or 0

    def destroy(self, stream: int) -> None:
        """Destroy a stream on which nothing is running."""
        self._call("cuStreamDestroy_v2", stream)

    def copy(self, way: str, blocks: Blocks, stream: int) -> None:
        """Start copies: "dtod" (two devices or one), "htod" or "dtoh". After an error, some may have been started."""
        call = self._functions[_COPIES[way]]
        for to, source, nbytes in zip(blocks.dst.tolist(), blocks.src.tolist(), blocks.length.tolist(), strict=True):
            code = call(to, source, nbytes, stream)
            if code:
                self._raise(_COPIES[way], code)

    def wait(self, stream: int) -> None:
        """Return when all work on the stream has completed. Raise `CudaError` if it never will."""
        self._call("cuStreamSynchronize", stream)

    def _call(self, name: str, *arguments: object) -> None:
        code = self._functions[name](*arguments)
        if code:
            self._raise(name, code)

    def _raise(self, name: str, code: int) -> None:
        texts = []
        for query in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            self._functions[query](code, text)
            texts.append((text.value or b"unknown").decode())
        raise CudaError(name, code, f"{texts[0]} ({code}), {texts[1]}")

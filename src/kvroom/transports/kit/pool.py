"""Memory for a KV pool: plain or shared, with huge pages where the system gives them.

Scattered copies touch a new page every few KiB; with 2 MiB pages the translation cache covers a pool, and the copies of
`local` run about twice as fast. A shared pool (memfd) can be mapped by a peer that may not write into our process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref

from kvroom.errors import ConfigurationError
from kvroom.wire.address import os_reason

_SEALS = (1033, 0x0001 | 0x0002 | 0x0004)  # F_ADD_SEALS; SEAL, SHRINK, GROW: a mapping of it can never fault


class Pool:
    """`nbytes` of zeroed memory at `address`; `buffer` views it (for `numpy.frombuffer`, `torch.frombuffer`).

    The memory lives until `close` or until the pool and every view of it are gone.
    """

    def __init__(self, nbytes: int, fd: int | None, huge: bool) -> None:
        self.nbytes = nbytes
        self.fd = fd
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if fd is None else mmap.MAP_SHARED
        self._map = mmap.mmap(-1 if fd is None else fd, nbytes, flags)
        with contextlib.suppress(OSError):  # a kernel without huge pages refuses the advice; the pool works anyway
            self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._release_fd = weakref.finalize(self, os.close, fd) if fd is not None else None

    @property
    def buffer(self) -> memoryview:
        """The whole pool, writable, as bytes."""
        return memoryview(self._map)

    def close(self) -> None:
        """Give the memory back. Raises `BufferError`, and keeps everything, while a view of it exists."""
        self._map.close()
        _shared.discard(self)  # its address and its descriptor's number may soon be somebody else's
        if self._release_fd is not None:
            self._release_fd()

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether the range lies in this pool."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


_shared: weakref.WeakSet[Pool] = weakref.WeakSet()


def allocate(nbytes: int, *, shared: bool = False, huge: bool = True) -> Pool:
    """Return a pool of `nbytes`, shared with peers of this machine that ask for it over `local` if `shared`.

    Without `huge` the kernel is asked for small pages: less memory where only parts of a pool are ever touched.
    """
    if nbytes <= 0:
        raise ConfigurationError(f"a pool of {nbytes} bytes cannot be allocated: ask for a positive size")
    try:
        if not shared:
            return Pool(nbytes, None, huge)
        fd = os.memfd_create("kvroom-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, *_SEALS)
            pool = Pool(nbytes, fd, huge)
        except BaseException:
            os.close(fd)
            raise
    except (OSError, OverflowError) as error:  # OverflowError: more than an address can say
        reason = os_reason(error) if isinstance(error, OSError) else "no machine has so much memory"
        raise ConfigurationError(
            f"a pool of {nbytes} bytes cannot be allocated: {reason}; ask for a smaller one"
        ) from error
    _shared.add(pool)
    return pool


def shared_pool(address: int, nbytes: int) -> Pool | None:
    """Return the open shared pool of this process in which the range lies, if there is one."""
    return next((pool for pool in list(_shared) if pool.covers(address, nbytes)), None)

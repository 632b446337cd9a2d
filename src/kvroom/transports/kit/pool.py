"""Memory for a KV pool: plain or shared, with huge pages where the system provides them.

Scattered copies touch a new page every few KiB. With pages of 2 MiB, the processor's translation cache (TLB) covers the
whole pool, and the copies of `local` run about twice as fast. A shared pool is a memfd, which a peer can map even if
the kernel does not permit it to write into this process.
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

# F_ADD_SEALS with SEAL, SHRINK and GROW: no process can resize the memory, so a peer that maps it never gets SIGBUS.
_SEALS = (1033, 0x0001 | 0x0002 | 0x0004)


class Pool:
    """A pool of `nbytes` zeroed bytes at `address`. `allocate` makes one.

    `buffer` is a view of it for `numpy.frombuffer` and `torch.frombuffer`. The memory lives until `close`, or until the
    pool and all its views are gone. `fd` is the descriptor of a shared pool, and None for a plain one.
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
        """A writable view of the whole pool as bytes."""
        return memoryview(self._map)

    def close(self) -> None:
        """Release the memory.

        Raises:
            BufferError: A view of the memory exists. Nothing is released then.
        """
        self._map.close()
        _shared.discard(self)  # its address and its descriptor's number may be reused from now on
        if self._release_fd is not None:
            self._release_fd()

    def covers(self, address: int, nbytes: int) -> bool:
        """Return True if the `nbytes` bytes at `address` lie in this pool."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


_shared: weakref.WeakSet[Pool] = weakref.WeakSet()


def allocate(nbytes: int, *, shared: bool = False, huge: bool = True) -> Pool:
    """Allocate memory for a KV pool.

    Args:
        nbytes: The size in bytes.
        shared: Allow peers on this machine to map the pool over `local`.
        huge: Ask the kernel for huge pages. Small pages take less memory if only parts of the pool are ever touched.

    Returns:
        The pool, filled with zeros. The caller closes it.

    Raises:
        ConfigurationError: The size is not positive, or the system does not have that much memory.
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
    except (OSError, OverflowError) as error:  # OverflowError: the size does not fit into an address
        reason = os_reason(error) if isinstance(error, OSError) else "no machine has so much memory"
        raise ConfigurationError(
            f"a pool of {nbytes} bytes cannot be allocated: {reason}; ask for a smaller one"
        ) from error
    _shared.add(pool)
    return pool


def shared_pool(address: int, nbytes: int) -> Pool | None:
    """Return the open shared pool of this process that contains the range, or None."""
    return next((pool for pool in list(_shared) if pool.covers(address, nbytes)), None)

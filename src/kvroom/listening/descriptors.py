"""The descriptor limit of a listening process: how to recognise it, and the descriptor kept in reserve for it.

If no descriptor is left, `accept` fails and the connection stays in the kernel's queue: its client has reached a server
that never answers. With the reserved descriptor, the server can accept the connection, state why it refuses it, and
close it. It does so with one connection at a time, so one descriptor is enough for any number of them.
"""

from __future__ import annotations

import errno
import os
import resource

from kvroom.wire.address import os_reason

RETRY_S = 1.0
"""The delay before another `accept` if one failed and no descriptor was in reserve."""
REQUEST_S = 0.05
"""The time that a refused client has to send its request; an answer sent before the request arrives may be lost."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_exhausted(error: OSError) -> bool:
    """Return True if the process or the machine has run out of a resource that `accept` needs."""
    return error.errno in _EXHAUSTED


def shortage(error: OSError) -> str:
    """Return the resource that has run out, and the remedy, as the end of a sentence."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: this process may have {limit}; raise its limit (ulimit -n)"
    if error.errno == errno.ENFILE:
        return "too many open files on this machine; raise its limit (sysctl fs.file-max)"
    return os.strerror(error.errno or 0).lower()


def describe_dial_error(error: OSError, hint: str) -> str:
    """Return why a connection could not be opened, as the end of a sentence.

    That is a shortage of this process, or the system's reason followed by `hint`, a question about the cause.
    """
    return shortage(error) if is_exhausted(error) else f"{os_reason(error)}; {hint}"


class SpareDescriptor:
    """One descriptor kept in reserve. Belongs to one thread, which must close it."""

    def __init__(self) -> None:
        self._fd = -1
        self.reserve()

    def free(self) -> bool:
        """Free the descriptor for `accept`. Return False if it is free already and could not be reserved again."""
        if self._fd < 0:
            return False
        os.close(self._fd)
        self._fd = -1
        return True

    def reserve(self) -> bool:
        """Reserve a descriptor again, once the connection is closed. Return False if none is left."""
        if self._fd < 0:
            try:
                self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # another thread was faster; the owner tries again after `RETRY_S`
                return False
        return True

    def close(self) -> None:
        """Release the descriptor. Idempotent."""
        self.free()

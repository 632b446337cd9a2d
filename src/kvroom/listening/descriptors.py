"""The descriptor limit of a process that listens: how it is told, and one descriptor that is kept back for it.

Where no descriptor is left, `accept` fails and the connection stays in the kernel's queue: its client sees a server
that is reached and never answers. With the descriptor kept back, a connection can be taken, told why it is refused, and
closed. Only then is the next one taken, so that one descriptor is enough for any number of them.
"""

from __future__ import annotations

import errno
import os
import resource

from kvroom.wire.address import os_reason

RETRY_S = 1.0
"""After `accept` has failed and there was no descriptor kept back, it is tried again after this time."""
ASK_S = 0.05
"""The time that a refused connection has to say what it wants: an answer that comes before that may be lost."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_exhausted(error: OSError) -> bool:
    """Return True if the process or the machine has run out of something that `accept` needs."""
    return error.errno in _EXHAUSTED


def shortage(error: OSError) -> str:
    """Name what has run out, and the remedy, to end a sentence."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: this process may have {limit}; raise its limit (ulimit -n)"
    if error.errno == errno.ENFILE:
        return "too many open files on this machine; raise its limit (sysctl fs.file-max)"
    return os.strerror(error.errno or 0).lower()


def describe_dial_error(error: OSError, question: str) -> str:
    """Return why a connection could not be opened, to end a sentence: our own shortage, or the reason, a question."""
    return shortage(error) if is_exhausted(error) else f"{os_reason(error)}; {question}"


class SpareDescriptor:
    """One descriptor that is kept back. Belongs to one thread; close it."""

    def __init__(self) -> None:
        self._fd = -1
        self.take_back()

    def lend(self) -> bool:
        """Make it free for `accept`. False: there is none, because another thread took it when it was lent before."""
        if self._fd < 0:
            return False
        os.close(self._fd)
        self._fd = -1
        return True

    def take_back(self) -> bool:
        """Keep one back again, once what it was lent for is closed. False: none is left to be kept back."""
        if self._fd < 0:
            try:
                self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # others were faster; the owner tries again after `RETRY_S`
                return False
        return True

    def close(self) -> None:
        """Give it up. Idempotent."""
        self.lend()

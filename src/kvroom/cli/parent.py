"""A child that dies with its parent, however the parent dies. Linux only (`prctl(2)`, PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal

from kvroom.errors import ConfigurationError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None, ending: signal.Signals) -> None:
    """Have the kernel send us `ending` when our parent is gone. None: we were started by hand, and stay.

    The wish survives `execve`. Raises `ConfigurationError` when the parent is gone already or the kernel refuses.
    """
    if parent_pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(ending), 0, 0, 0) != 0:
        raise ConfigurationError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}; start without a parent")
    if os.getppid() != parent_pid:
        raise ConfigurationError(f"the parent process {parent_pid} is gone: start the command anew")

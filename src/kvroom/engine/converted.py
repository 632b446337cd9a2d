"""Directories that are made once and kept: they appear whole or not at all, and of several processes one makes them.

Nothing is left of one that could not be written: what fills half a disk would keep it full.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from kvroom.errors import ConfigurationError

Progress = Callable[[str], None]


def build_once(target: Path, build: Callable[[Path], None], nbytes: int, tell: Progress, what: str) -> None:
    """Let `build` fill the directory `target`, about `nbytes`, if it is not there yet: whole, or not at all.

    Of several processes one builds, and the others wait for it; `tell` is told `what` it is that takes time.
    `ConfigurationError` if it cannot be written. Nothing of it is left then: the rest would keep a full disk full.
    """
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"waiting for another process that is {what}")
                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed; a process that dies lets go of it
            else:
                tell(what)
            if not target.is_dir():
                free = shutil.disk_usage(target.parent).free
                if free < nbytes:  # said now, and not after half a minute
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC).lower()}, {free >> 20} MiB are free")
                shutil.rmtree(unfinished, ignore_errors=True)
                try:
                    build(unfinished)
                    unfinished.rename(target)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError(
            f"the packaged model cannot be converted into {target}: {reason.splitlines()[0]}: make room there "
            f"({nbytes >> 20} MiB), or set XDG_CACHE_HOME to a writable directory with as much"
        ) from error

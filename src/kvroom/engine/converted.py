"""Directories that are built once and kept. They appear complete or not at all, and only one process builds them.

A directory that could not be completed is deleted: its files would otherwise keep a full disk full.
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


def build_once(target: Path, build: Callable[[Path], None], nbytes: int, progress: Progress, task: str) -> None:
    """Create the directory `target` of about `nbytes` bytes with `build`, unless it exists already.

    If several processes need it, one builds and the others block until it is done. `progress` receives one line that
    names the `task`. Raises `ConfigurationError` if the directory cannot be written; the partial directory is deleted.
    """
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another process that is {task}")
                # The lock is held until the file is closed; the system releases it if the process dies.
                fcntl.flock(lock, fcntl.LOCK_EX)
            else:
                progress(task)
            if not target.is_dir():
                free = shutil.disk_usage(target.parent).free
                if free < nbytes:  # fail now, and not after half a minute of conversion
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
            f"the packaged model cannot be converted into {target}: {reason.splitlines()[0]}: free {nbytes >> 20} MiB "
            f"there, or set XDG_CACHE_HOME to a writable directory with that much space"
        ) from error

"""The shared secret: where it comes from, and (from `kvroom.wire.auth`) where one is required.

A secret is the bytes of `KVROOM_SECRET` (UTF-8), or of the file that `KVROOM_SECRET_FILE` names, without white space at
its ends. It never appears in an error, a log or a `repr` of this package.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from kvroom.errors import ConfigurationError
from kvroom.wire.auth import (
    MIN_SECRET_BYTES,
    SECRET_FILE_VARIABLE,
    SECRET_REMEDY,
    SECRET_VARIABLE,
    require_secret,
)

__all__ = ["MIN_SECRET_BYTES", "SECRET_FILE_VARIABLE", "SECRET_VARIABLE", "load_secret", "require_secret"]

_MAX_SECRET_BYTES = 4096
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
"""What a file may be that is not regular: reading it may block for ever, or change something."""


def load_secret(environ: Mapping[str, str], file: str | os.PathLike[str] | None = None) -> bytes:
    """The secret from `file`, else from `environ`, else `b""`. `ConfigurationError` for one that is unusable.

    `file` (an explicit setting) wins over the environment; the two variables together are a contradiction.
    """
    if file is not None:
        return _from_file(Path(file), "the secret file")
    inline, path = environ.get(SECRET_VARIABLE), environ.get(SECRET_FILE_VARIABLE)
    if inline is not None and path is not None:
        raise ConfigurationError(f"both {SECRET_VARIABLE} and {SECRET_FILE_VARIABLE} are set: unset one of them")
    if path is not None:
        return _from_file(Path(path), SECRET_FILE_VARIABLE)
    if inline is not None:
        return _checked(os.fsencode(inline), SECRET_VARIABLE)
    return b""


def _from_file(path: Path, origin: str) -> bytes:
    try:
        # Looked at before it is opened, because opening a device may do something; and again once it is open, because
        # the name may stand for something else by then. Without O_NONBLOCK a FIFO would wait for its writer.
        _check_regular(path.stat().st_mode, path, origin)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            _check_regular(mode, path, origin)
            data = file.read(_MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"{origin} {str(path)!r} cannot be read: {reason}") from None
    if mode & stat.S_IRWXO:
        raise ConfigurationError(f"{origin} {str(path)!r} is open to every user: run `chmod o-rwx {path}`")
    return _checked(data, f"{origin} {str(path)!r}")


def _check_regular(mode: int, path: Path, origin: str) -> None:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), None)
    if kind is not None:
        raise ConfigurationError(f"{origin} {str(path)!r} is {kind}: give a regular file that holds the secret")


def _checked(data: bytes, origin: str) -> bytes:
    secret = data.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"{origin} holds a secret of {len(secret)} bytes, too short to be safe: {SECRET_REMEDY}"
        )
    if len(secret) > _MAX_SECRET_BYTES:
        raise ConfigurationError(f"{origin} holds more than {_MAX_SECRET_BYTES} bytes: {SECRET_REMEDY}")
    return secret

"""What only some may know: where it comes from, and (from `kvroom.wire.auth`) where it is required.

The shared secret is the bytes of `KVROOM_SECRET` (UTF-8), or of the file that `KVROOM_SECRET_FILE` names, without white
space at its ends. The token of admin addresses comes from `KVROOM_ADMIN_TOKEN` or `KVROOM_ADMIN_TOKEN_FILE` in the same
way, and the API keys of clients from `KVROOM_API_KEY` or `KVROOM_API_KEY_FILE`. None of them ever appears in an error,
a log or a `repr` of this package.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kvroom.errors import ConfigurationError
from kvroom.wire.auth import (
    ADMIN_TOKEN_FILE_VARIABLE,
    ADMIN_TOKEN_VARIABLE,
    API_KEY_FILE_VARIABLE,
    API_KEY_VARIABLE,
    MIN_SECRET_BYTES,
    SECRET_FILE_VARIABLE,
    SECRET_REMEDY,
    SECRET_VARIABLE,
    require_secret,
)

__all__ = [
    "MIN_SECRET_BYTES",
    "SECRET_FILE_VARIABLE",
    "SECRET_VARIABLE",
    "load_admin_token",
    "load_api_keys",
    "load_secret",
    "require_secret",
]

_MAX_SECRET_BYTES = 4096
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
"""What a file may be that is not regular: reading it may block for ever, or change something."""


class _Kind(NamedTuple):
    """One thing that only some may know: its name in errors, and the variables that hold it or name its file."""

    name: str
    variable: str
    file_variable: str


_SECRET = _Kind("secret", SECRET_VARIABLE, SECRET_FILE_VARIABLE)
_TOKEN = re.compile(rb"[!-~]+")  # what an HTTP header carries as it stands
_API_KEY = _Kind("key", API_KEY_VARIABLE, API_KEY_FILE_VARIABLE)
_ADMIN_TOKEN = _Kind("token", ADMIN_TOKEN_VARIABLE, ADMIN_TOKEN_FILE_VARIABLE)


def load_secret(environ: Mapping[str, str], file: str | os.PathLike[str] | None = None) -> bytes:
    """The secret from `file`, else from `environ`, else `b""`. `ConfigurationError` for one that is unusable.

    `file` (an explicit setting) wins over the environment; the two variables together are a contradiction.
    """
    if file is not None:
        return _from_file(Path(file), "the secret file", _SECRET)
    return _from_environment(environ, _SECRET)


def load_admin_token(environ: Mapping[str, str]) -> bytes:
    """Return the token of admin addresses from `environ`, or `b""`. `ConfigurationError` for one that is unusable.

    It has to travel in an HTTP header: printable ASCII without spaces.
    """
    token = _from_environment(environ, _ADMIN_TOKEN)
    return token and _checked_token(token, f"{ADMIN_TOKEN_VARIABLE} or its file", _ADMIN_TOKEN.name)


def load_api_keys(environ: Mapping[str, str], given: Sequence[str] = ()) -> tuple[bytes, ...]:
    """Return the API keys that were `given`, else those from `environ`, in their order; empty if there are none.

    A variable or file holds one key or several, with white space between them. `ConfigurationError` for one that is
    unusable: each has to travel in an HTTP header.
    """
    if given:
        return tuple(_checked_token(os.fsencode(key), "--api-key", _API_KEY.name) for key in given)
    keys = _from_environment(environ, _API_KEY).split()
    return tuple(_checked_token(key, f"{API_KEY_VARIABLE} or its file", _API_KEY.name) for key in keys)


def _from_environment(environ: Mapping[str, str], kind: _Kind) -> bytes:
    inline, path = environ.get(kind.variable), environ.get(kind.file_variable)
    if inline is not None and path is not None:
        raise ConfigurationError(f"both {kind.variable} and {kind.file_variable} are set: unset one of them")
    if path is not None:
        return _from_file(Path(path), kind.file_variable, kind)
    if inline is not None:
        return _checked(os.fsencode(inline), kind.variable, kind)
    return b""


def _from_file(path: Path, origin: str, kind: _Kind) -> bytes:
    try:
        # Looked at before it is opened, because opening a device may do something; and again once it is open, because
        # the name may stand for something else by then. Without O_NONBLOCK a FIFO would wait for its writer.
        _check_regular(path.stat().st_mode, path, origin, kind.name)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            _check_regular(mode, path, origin, kind.name)
            data = file.read(_MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"{origin} {str(path)!r} cannot be read: {reason}") from None
    if mode & stat.S_IRWXO:
        raise ConfigurationError(f"{origin} {str(path)!r} is open to every user: run `chmod o-rwx {path}`")
    return _checked(data, f"{origin} {str(path)!r}", kind)


def _check_regular(mode: int, path: Path, origin: str, name: str) -> None:
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), None)
    if kind is not None:
        raise ConfigurationError(f"{origin} {str(path)!r} is {kind}: give a regular file that holds the {name}")


def _checked(data: bytes, origin: str, kind: _Kind) -> bytes:
    secret = data.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"{origin} holds a {kind.name} of {len(secret)} bytes, too short to be safe: {SECRET_REMEDY}"
        )
    if len(secret) > _MAX_SECRET_BYTES:
        raise ConfigurationError(f"{origin} holds more than {_MAX_SECRET_BYTES} bytes: {SECRET_REMEDY}")
    return secret


def _checked_token(token: bytes, origin: str, name: str) -> bytes:
    """Check one that travels in HTTP headers."""
    if len(token) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"{origin} holds a {name} of {len(token)} bytes, too short to be safe: {SECRET_REMEDY}"
        )
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            f"{origin} holds a {name} that no HTTP header can carry: write one of printable ASCII without spaces, "
            "for example with `openssl rand -hex 32`"
        )
    return token

"""Secrets from environment and files: the shared secret, the admin token and the API keys.

The shared secret is the bytes of `KVROOM_SECRET` (UTF-8), or of the file that `KVROOM_SECRET_FILE` names, without white
space at its ends. The token of admin addresses comes from `KVROOM_ADMIN_TOKEN` or `KVROOM_ADMIN_TOKEN_FILE` in the same
way, and the API keys of clients from `KVROOM_API_KEY` or `KVROOM_API_KEY_FILE`. None of them appears in an error, a log
or a `repr` of this package. `kvroom.wire.auth` decides where a secret is required.
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
_READ_ONLY_REMEDY = (
    "its file system is mounted read-only, so set the mode where it is mounted, in Kubernetes `defaultMode: 0440` of "
    "the secret volume and `fsGroup` in the pod's securityContext"
)
"""The remedy on a read-only mount. `fsGroup` gives the files a group that the container's user belongs to."""
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
"""Kinds of files that are refused: reading them may block without end, or have side effects."""


class _Kind(NamedTuple):
    """One kind of secret."""

    name: str
    """Its name in errors."""
    variable: str
    """The environment variable that holds it."""
    file_variable: str
    """The environment variable that names its file."""


_SECRET = _Kind("secret", SECRET_VARIABLE, SECRET_FILE_VARIABLE)
_TOKEN = re.compile(rb"[!-~]+")  # bytes that an HTTP header carries unchanged
_API_KEY = _Kind("key", API_KEY_VARIABLE, API_KEY_FILE_VARIABLE)
_ADMIN_TOKEN = _Kind("token", ADMIN_TOKEN_VARIABLE, ADMIN_TOKEN_FILE_VARIABLE)


def load_secret(environ: Mapping[str, str], file: str | os.PathLike[str] | None = None) -> bytes:
    """Return the shared secret, or `b""` if none is set.

    Args:
        environ: environment variables; `KVROOM_SECRET` and `KVROOM_SECRET_FILE` are read.
        file: a file that holds the secret, an explicit setting that takes precedence over the environment.

    Raises:
        ConfigurationError: both variables are set, the file cannot be read or is open to every user, or the secret is
            too short or too long. No message contains the secret.
    """
    if file is not None:
        return _from_file(Path(file), "the secret file", _SECRET)
    return _from_environment(environ, _SECRET)


def load_admin_token(environ: Mapping[str, str]) -> bytes:
    """Return the token of admin addresses from `environ`, or `b""` if none is set.

    Raises:
        ConfigurationError: as `load_secret`, or the token is not printable ASCII without spaces, which it must be to
            travel in an HTTP header.
    """
    token = _from_environment(environ, _ADMIN_TOKEN)
    return token and _checked_token(token, f"{ADMIN_TOKEN_VARIABLE} or its file", _ADMIN_TOKEN.name)


def load_api_keys(environ: Mapping[str, str], given: Sequence[str] = ()) -> tuple[bytes, ...]:
    """Return the API keys that were `given`, or else those from `environ`, in their order; empty if there are none.

    A variable or file holds one key or several, with white space between them.

    Raises:
        ConfigurationError: as `load_admin_token`, for each key.
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
        # Checked before it is opened, because opening a device may have side effects; and again once it is open,
        # because the name may point to another file by then. Without O_NONBLOCK a FIFO would wait for its writer.
        _check_regular(path.stat().st_mode, path, origin, kind.name)
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            _check_regular(mode, path, origin, kind.name)
            data = file.read(_MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, PermissionError) and _is_read_only(path):
            reason = f"{reason}; {_READ_ONLY_REMEDY}"
        raise ConfigurationError(f"{origin} {str(path)!r} cannot be read: {reason}") from None
    if mode & stat.S_IRWXO:
        remedy = _READ_ONLY_REMEDY if _is_read_only(path) else f"run `chmod o-rwx {path}`"
        raise ConfigurationError(f"{origin} {str(path)!r} is open to every user (mode {mode & 0o777:04o}): {remedy}")
    return _checked(data, f"{origin} {str(path)!r}", kind)


def _is_read_only(path: Path) -> bool:
    """Return True if the file system of this path is mounted read-only, so that `chmod` cannot mend its mode."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:  # a folder on the way may not be searched
        return False


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
    """Return a token that an HTTP header can carry; raise `ConfigurationError` for any other."""
    if len(token) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"{origin} holds a {name} of {len(token)} bytes, too short to be safe: {SECRET_REMEDY}"
        )
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            f"invalid {name} in {origin}: an HTTP header carries only printable ASCII without spaces; create one with "
            "`openssl rand -hex 32`"
        )
    return token

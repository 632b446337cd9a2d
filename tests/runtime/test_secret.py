"""The secret: where it comes from, and that a bad one is refused with the remedy and never printed."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvroom.errors import ConfigurationError
from kvroom.runtime.secret import load_secret
from kvroom.transports.data_keys import DataKey
from kvroom.wire.auth import require_secret

GOOD = "0123456789abcdef0123456789abcdef"


def secret_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_sources_and_their_order(tmp_path: Path) -> None:
    path = secret_file(tmp_path, f"  {GOOD}-from-file\n")
    assert load_secret({}) == b""
    assert load_secret({"KVROOM_SECRET": GOOD}) == GOOD.encode()
    assert load_secret({"KVROOM_SECRET_FILE": str(path)}) == f"{GOOD}-from-file".encode()
    assert load_secret({"KVROOM_SECRET": GOOD}, path) == f"{GOOD}-from-file".encode()
    assert load_secret({}, secret_file(tmp_path, GOOD, 0o640)) == GOOD.encode()


def test_a_bad_secret_is_named_with_the_remedy_and_never_shown(tmp_path: Path) -> None:
    def says(part: str, environ: dict[str, str]) -> None:
        with pytest.raises(ConfigurationError, match=part) as caught:
            load_secret(environ)
        assert "hunter2" not in str(caught.value)

    says("KVROOM_SECRET holds a secret of 7 bytes.*openssl rand", {"KVROOM_SECRET": "hunter2"})
    says("KVROOM_SECRET holds a secret of 0 bytes", {"KVROOM_SECRET": ""})
    says("KVROOM_SECRET holds more than 4096 bytes", {"KVROOM_SECRET": "hunter2" * 1000})
    says("both KVROOM_SECRET and KVROOM_SECRET_FILE", {"KVROOM_SECRET": GOOD, "KVROOM_SECRET_FILE": "/x"})
    says("cannot be read: No such file", {"KVROOM_SECRET_FILE": str(tmp_path / "none")})
    says("is a directory: give a regular file", {"KVROOM_SECRET_FILE": str(tmp_path)})
    says("cannot be read: embedded null byte", {"KVROOM_SECRET_FILE": "a\0b"})
    path = secret_file(tmp_path, "hunter2-hunter2-hunter2", 0o644)
    says("is open to every user: run `chmod o-rwx", {"KVROOM_SECRET_FILE": str(path)})


def test_a_secret_is_required_beyond_loopback() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        require_secret(host, b"")
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "worker-3"):
        require_secret(host, GOOD.encode())
        with pytest.raises(ConfigurationError, match="needs a shared secret: set KVROOM_SECRET or KVROOM_SECRET_FILE"):
            require_secret(host, b"")


def _pipe(path: Path) -> Path:
    os.mkfifo(path, 0o600)
    return path


def _link_to_a_pipe(path: Path) -> Path:
    path.symlink_to(_pipe(path.with_suffix(".pipe")))
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_pipe, "is a pipe (FIFO)"),
        (_link_to_a_pipe, "is a pipe (FIFO)"),
        (_socket, "is a socket"),
        (lambda _path: Path("/dev/zero"), "is a character device"),
        (lambda _path: Path("/dev/tty"), "is a character device"),
        (lambda path: path.parent, "is a directory"),
    ],
    ids=["pipe", "link", "socket", "zero", "tty", "directory"],
)
def test_a_secret_file_that_is_no_file_is_refused_at_once(
    make: Callable[[Path], Path], says: str, tmp_path: Path
) -> None:
    """In a process of its own, which a read that blocks would hold for ever."""
    path = make(tmp_path / "s")
    code = f"from kvroom.runtime.secret import load_secret; load_secret({{}}, {str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"the secret file {str(path)!r} {says}: give a regular file that holds the secret"
    )


def test_a_link_to_a_secret_file_is_followed(tmp_path: Path) -> None:
    """Secrets that an orchestrator mounts are links."""
    link = tmp_path / "link"
    link.symlink_to(secret_file(tmp_path, GOOD))
    assert load_secret({}, link) == GOOD.encode()


def test_no_repr_shows_a_data_key() -> None:
    key = secrets.token_bytes(32)
    shown = repr(DataKey(bytes(32), bytes(32), key))
    assert repr(key) not in shown
    assert key.hex() not in shown

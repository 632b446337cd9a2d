"""The secret: its sources, and that an invalid one is refused with a remedy and never printed."""

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
from kvroom.runtime.secret import load_admin_token, load_api_keys, load_secret
from kvroom.transports.kit.data_keys import DataKey
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
    says(r"is open to every user \(mode 0644\): run `chmod o-rwx", {"KVROOM_SECRET_FILE": str(path)})


def test_an_admin_token_is_read_as_carefully_as_the_secret(tmp_path: Path) -> None:
    def says(part: str, environ: dict[str, str]) -> None:
        with pytest.raises(ConfigurationError, match=part) as caught:
            load_admin_token(environ)
        assert "hunter2" not in str(caught.value)

    assert load_admin_token({"KVROOM_SECRET": GOOD}) == b""
    assert load_admin_token({"KVROOM_ADMIN_TOKEN": f" {GOOD}\n"}) == GOOD.encode()
    path = secret_file(tmp_path, f"{GOOD}\n", 0o640)
    assert load_admin_token({"KVROOM_ADMIN_TOKEN_FILE": str(path)}) == GOOD.encode()
    says("KVROOM_ADMIN_TOKEN holds a token of 7 bytes.*openssl rand", {"KVROOM_ADMIN_TOKEN": "hunter2"})
    says("KVROOM_ADMIN_TOKEN holds a token of 0 bytes", {"KVROOM_ADMIN_TOKEN": ""})
    says("both KVROOM_ADMIN_TOKEN and ", {"KVROOM_ADMIN_TOKEN": GOOD, "KVROOM_ADMIN_TOKEN_FILE": "/x"})
    for text in ("hunter2 hunter2 hunter2", "hunter2\r\nX-Header: hunter2", "hunter2-h\u00fcnter2-hunter2"):
        says("invalid token in KVROOM_ADMIN_TOKEN or its file: an HTTP header", {"KVROOM_ADMIN_TOKEN": text})
    os.mkfifo(tmp_path / "pipe", 0o600)
    says(r"is a pipe \(FIFO\): give a regular.* the token", {"KVROOM_ADMIN_TOKEN_FILE": str(tmp_path / "pipe")})
    path.write_text("hunter2-hunter2-hunter2")
    path.chmod(0o644)
    says(r"is open to every user \(mode 0644\): run `chmod o-rwx", {"KVROOM_ADMIN_TOKEN_FILE": str(path)})


def test_api_keys_are_read_as_carefully_and_may_be_several(tmp_path: Path) -> None:
    def says(part: str, environ: dict[str, str], *given: str) -> None:
        with pytest.raises(ConfigurationError, match=part) as caught:
            load_api_keys(environ, given)
        assert "hunter2" not in str(caught.value)

    other = GOOD[::-1]
    assert load_api_keys({"KVROOM_SECRET": GOOD, "KVROOM_ADMIN_TOKEN": GOOD}) == ()
    assert load_api_keys({"KVROOM_API_KEY": GOOD}) == (GOOD.encode(),)
    assert load_api_keys({"KVROOM_API_KEY": GOOD}, [other]) == (other.encode(),)
    path = secret_file(tmp_path, f"{GOOD}\n{other}\n")
    assert load_api_keys({"KVROOM_API_KEY_FILE": str(path)}) == (GOOD.encode(), other.encode())
    says("KVROOM_API_KEY holds a key of 0 bytes", {"KVROOM_API_KEY": ""})
    says("holds a key of 7 bytes, too short", {"KVROOM_API_KEY": f"{GOOD} hunter2"})
    says("--api-key holds a key of 7 bytes, too short", {}, GOOD, "hunter2")
    says("--api-key holds a key of 0 bytes, too short", {}, "")
    says("invalid key in --api-key: an HTTP header", {}, "hunter2 hunter2 hunter2")
    says("both KVROOM_API_KEY and KVROOM_API_KEY_FILE", {"KVROOM_API_KEY": GOOD, "KVROOM_API_KEY_FILE": "/x"})
    path.chmod(0o644)
    says(r"is open to every user \(mode 0644\): run `chmod o-rwx", {"KVROOM_API_KEY_FILE": str(path)})


READ_ONLY = """
set -e
mount -t tmpfs -o mode=0755 none "$1"
mkdir "$1/..2026"
printf %s "$3" >"$1/..2026/secret"
chown 0:4711 "$1/..2026/secret"
chmod "$2" "$1/..2026/secret"
ln -s ..2026 "$1/..data"
ln -s ..data/secret "$1/secret"
mount -o remount,ro "$1"
shift 3
exec "$@"
"""
LOADERS = """
import os
import sys

from kvroom.errors import ConfigurationError
from kvroom.network import load_admin_token, load_api_keys, load_secret

path, groups = sys.argv[1], [int(group) for group in sys.argv[2].split()]
os.setgroups(groups)
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for load in (
    lambda: load_secret({"KVROOM_SECRET_FILE": path}),
    lambda: load_secret({}, path),
    lambda: load_api_keys({"KVROOM_API_KEY_FILE": path})[0],
    lambda: load_admin_token({"KVROOM_ADMIN_TOKEN_FILE": path}),
):
    try:
        print(load().decode())
    except ConfigurationError as error:
        print(error)
"""
CAN_MOUNT = os.geteuid() == 0 and (
    subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    .returncode == 0
)  # fmt: skip


@pytest.mark.skipif(not CAN_MOUNT, reason="mounting a tmpfs in a private mount namespace needs root")
@pytest.mark.parametrize(
    ("mode", "groups", "said"),
    [
        ("0440", "4711", None),
        ("0444", "4711", "is open to every user (mode 0444): its file system is mounted read-only"),
        ("0644", "", "is open to every user (mode 0644): its file system is mounted read-only"),
        ("0440", "", "cannot be read: Permission denied; its file system is mounted read-only"),
        ("0400", "4711", "cannot be read: Permission denied; its file system is mounted read-only"),
    ],
)
def test_a_secret_that_kubernetes_mounts(mode: str, groups: str, said: str | None) -> None:
    """Mount a read-only volume with links as in a secret volume, and read it as a user that does not own it.

    It is mounted on /mnt of a private namespace, because pytest's folders are closed to other users.
    """
    command = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", "/mnt", mode, GOOD]
    python = [sys.executable, "-c", LOADERS, "/mnt/secret", groups]
    done = subprocess.run([*command, *python], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        if said is None:
            assert line == GOOD
        else:
            assert said in line
            assert line.endswith("`defaultMode: 0440` of the secret volume and `fsGroup` in the pod's securityContext")
            assert "chmod" not in line
            assert GOOD not in line


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
    """In a process of its own, which a blocking read would hang without end."""
    path = make(tmp_path / "s")
    code = f"from kvroom.runtime.secret import load_secret; load_secret({{}}, {str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"the secret file {str(path)!r} {says}: give a regular file that holds the secret"
    )


def test_a_link_to_a_secret_file_is_followed(tmp_path: Path) -> None:
    """Secrets that an orchestrator mounts are symbolic links."""
    link = tmp_path / "link"
    link.symlink_to(secret_file(tmp_path, GOOD))
    assert load_secret({}, link) == GOOD.encode()


def test_no_repr_shows_a_data_key() -> None:
    key = secrets.token_bytes(32)
    shown = repr(DataKey(bytes(32), bytes(32), key))
    assert repr(key) not in shown
    assert key.hex() not in shown

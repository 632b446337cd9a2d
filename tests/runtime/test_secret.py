"""The secret: where it comes from, and that a bad one is refused with the remedy and never printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvroom.errors import ConfigurationError
from kvroom.runtime.secret import load_secret
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
    says("cannot be read: Is a directory", {"KVROOM_SECRET_FILE": str(tmp_path)})
    path = secret_file(tmp_path, "hunter2-hunter2-hunter2", 0o644)
    says("is open to every user: run `chmod o-rwx", {"KVROOM_SECRET_FILE": str(path)})


def test_a_secret_is_required_beyond_loopback() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        require_secret(host, b"")
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "worker-3"):
        require_secret(host, GOOD.encode())
        with pytest.raises(ConfigurationError, match="needs a shared secret: set KVROOM_SECRET or KVROOM_SECRET_FILE"):
            require_secret(host, b"")

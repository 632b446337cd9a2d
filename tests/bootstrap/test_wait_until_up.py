"""`wait_until_up`: an engine waits for a directory that its own server starts at about the same time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvroom.bootstrap.client import wait_until_up
from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.errors import BootstrapError, ConfigurationError
from kvroom.wire.address import HostPort


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Serve one connection after the other with `answer`, close each, and yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # the listener was shut down
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(HostPort(*listener.getsockname()[:2]))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_directory_that_is_up_is_found_with_a_secret_and_without() -> None:
    for secret in (b"", b"a secret of sixteen bytes"):
        with KVBootstrapServer(secret=secret) as server:
            wait_until_up(server.address, 0.0)


def test_a_directory_that_comes_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    server = KVBootstrapServer(port=unused_port())
    address = f"127.0.0.1:{server._listen.port}"
    tries = []

    def pause(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 2:
            server.start()

    monkeypatch.setattr("kvroom.bootstrap.client.time.sleep", pause)
    try:
        wait_until_up(address, 30.0)
    finally:
        server.close()
    assert len(tries) == 2


def test_no_directory_is_an_error_that_names_address_and_time() -> None:
    port = unused_port()
    with pytest.raises(BootstrapError, match=rf"timed out after 0 s: .* 127\.0\.0\.1:{port} .*connection refused"):
        wait_until_up(f"127.0.0.1:{port}", 0.0)


def test_another_server_is_an_error_and_is_not_waited_for() -> None:
    with (
        answering(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n") as address,
        pytest.raises(BootstrapError, match=r"is not a bootstrap directory \(GET /health returned 404\)"),
    ):
        wait_until_up(address, 30.0)


def test_a_server_that_speaks_no_http_is_an_error() -> None:
    with answering(b"\x00\x01\x02\r\n") as address, pytest.raises(BootstrapError, match=r"no HTTP server \(BadStatus"):
        wait_until_up(address, 0.0)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
    with KVBootstrapServer() as server:
        wait_until_up(server.address, 0.0)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:x", "a b:1", "::1:8998"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="address"):
        wait_until_up(address, 0.0)

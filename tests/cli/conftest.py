"""Fixtures: a tiny model for the commands that run one, and a server that is not a kvroom worker."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.helpers import save_tiny_model

LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class _Stranger(http.server.BaseHTTPRequestHandler):
    """A server that is not a kvroom worker. Under `/junk` it answers with invalid rooms, elsewhere with 404."""

    def do_GET(self) -> None:
        body = b'{"open": [{"room": "seven"}]}' if self.path.startswith("/junk") else b"no such page"
        self.send_response(200 if self.path.startswith("/junk") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


@pytest.fixture
def stranger() -> Iterator[str]:
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), _Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
        server.shutdown()
        thread.join()

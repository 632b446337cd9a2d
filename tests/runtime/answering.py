"""An HTTP server in the place of a bootstrap directory, whose answer the test chooses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvroom.bootstrap import sign


@contextlib.contextmanager
def directory(answer: bytes, secret: bytes = b"") -> Iterator[str]:
    """Answer every request with these bytes, signed if there is a secret; yield the address."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            if secret:
                signed = sign.check(secret, self.headers[sign.HEADER], "GET", self.path, b"")
                self.send_header(sign.ANSWER_HEADER, sign.sign_answer(secret, signed.nonce, 200, answer))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()

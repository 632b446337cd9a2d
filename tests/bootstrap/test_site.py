"""Invalid requests are logged by the kind of their error: a header that signs a request never reaches the log."""

from __future__ import annotations

import asyncio
import logging

import pytest
from aiohttp import web

from kvroom.bootstrap.site import http_site
from kvroom.wire.address import HostPort

SIGNATURE = f"KVRoom 1796175553:{'c6ea611f' * 8}"


@pytest.mark.parametrize(
    "request_bytes",
    [
        f"{SIGNATURE}\r\n\r\n",
        f"GET /route HTTP/1.1\r\nAuthorization {SIGNATURE}\r\n\r\n",
        f"GET /route HTTP/1.1\r\nAuthorization: {SIGNATURE * 300}\r\n\r\n",
        f"GET /{SIGNATURE * 300} HTTP/1.1\r\n\r\n",
        f"GET /route HTTP/1.1\r\nContent-Length: {SIGNATURE}\r\n\r\n",
    ],
    ids=["no method", "no colon", "long header", "long path", "no length"],
)
def test_no_log_line_quotes_a_request_that_is_none(request_bytes: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def body() -> bytes:
        async with http_site(web.Application(), HostPort("127.0.0.1", 0), shutdown_s=1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes.encode())
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(body()).startswith(b"HTTP/1.0 400 ")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "kvroom.bootstrap.site"]
    assert line.startswith("a client sent an invalid HTTP request: ")
    assert "c6ea611f" not in caplog.text

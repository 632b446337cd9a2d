"""Exceptions of a handler reach the client as JSON, always."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from kvroom.bootstrap.site import http_site
from kvroom.errors import KVRoomError
from kvroom.status.answers import BadRequest, errors_as_json
from kvroom.wire.address import HostPort

Answer = tuple[int, str, str]


def answer_of(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Answer:
    """Return status, content type and body of the response of one handler over a real connection."""

    async def story() -> Answer:
        app = web.Application(middlewares=[errors_as_json])
        app.add_routes([web.get("/", handler)])
        async with (
            http_site(app, HostPort("127.0.0.1", 0), shutdown_s=1.0) as port,
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/") as response,
        ):
            return response.status, response.content_type, await response.text()

    return asyncio.run(story())


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ZeroDivisionError("secret"), 500, "internal error, ZeroDivisionError: see the log of this server"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "secret"), 500, "internal error, UnicodeDecodeError"),
        (RecursionError("secret"), 500, "internal error, RecursionError"),
        (BadRequest("top_p is wrong"), 400, "top_p is wrong"),
        (KVRoomError("try again"), 503, "try again"),
        (web.HTTPRequestEntityTooLarge(1, 2), 413, "GET /: Request Entity Too Large"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_fault_of_a_handler_is_told_in_json(
    error: Exception, status: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        raise error

    with caplog.at_level(logging.ERROR):
        found, kind, text = answer_of(handler)
    assert (found, kind) == (status, "application/json")
    assert words in text
    assert "Traceback" not in text
    assert "secret" not in text
    assert ("in the handler of GET /" in caplog.text) == (status == 500)


def test_a_fault_after_the_answer_began_cuts_the_answer_off(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"so far")
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR), pytest.raises(aiohttp.ClientPayloadError):
        answer_of(handler)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("line", ["GET / HTTP/1.0", "GET /nothing HTTP/1.0", "PUT / HTTP/1.0", "GET / HTTP/1.1"])
def test_a_client_of_the_old_http_is_told_the_fault_too(line: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        raise BadRequest("top_p is wrong")

    async def story() -> bytes:
        app = web.Application(middlewares=[errors_as_json])
        app.add_routes([web.get("/", handler)])
        async with http_site(app, HostPort("127.0.0.1", 0), shutdown_s=1.0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            said = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            await writer.wait_closed()
            return said

    head, _, body = asyncio.run(story()).partition(b"\r\n\r\n")
    is_new = line.endswith("1.1")
    assert head.startswith(b"HTTP/1.1 4" if is_new else b"HTTP/1.0 4")
    assert (b"Transfer-Encoding: chunked" in head) is is_new
    if not is_new:
        assert "message" in json.loads(body)["error"]
    assert not caplog.records

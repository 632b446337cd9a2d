"""Admission to an admin address: holders of the token, or processes of this machine, but no web page."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from kvroom.errors import ConfigurationError
from kvroom.status.admin import Admission
from kvroom.status.server import StatusServer
from kvroom.wire.address import parse_address

from .status_helpers import Pair, ask

TOKEN = b"0123456789abcdef-the-token"
HEADER = f"Bearer {TOKEN.decode()}"


@pytest.fixture
def guarded(pair: Pair) -> Iterator[str]:
    with StatusServer(pair.prefill, token=TOKEN) as server:
        yield server.address


def say(address: str, *lines: str) -> int:
    """Send a request with exactly these header lines, and return the status of the response."""
    with socket.create_connection(parse_address(address), timeout=20) as sock:
        sock.sendall("\r\n".join(["GET /rooms HTTP/1.1", *lines, "", ""]).encode())
        response = http.client.HTTPResponse(sock)
        with closing(response):
            response.begin()
            return response.status


@pytest.mark.parametrize("line", [HEADER, f"bearer {TOKEN.decode()}", f"BEARER  {TOKEN.decode()}"])
def test_the_token_admits(guarded: str, line: str) -> None:
    assert say(guarded, "Host: worker-3", f"Authorization: {line}") == 200


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("Authorization:",),
        ("Authorization: Bearer",),
        (f"Authorization: {TOKEN.decode()}",),
        (f"Authorization: Basic {TOKEN.decode()}",),
        (f"Authorization: {HEADER[:-1]}",),
        (f"Authorization: {HEADER}x",),
        ("Authorization: Bearer \u00e4\u00f6",),
        (f"Authorization: {HEADER}", f"Authorization: {HEADER}"),
    ],
)
def test_without_the_very_token_everything_is_refused(guarded: str, lines: tuple[str, ...]) -> None:
    assert say(guarded, "Host: 127.0.0.1", *lines) in (400, 401)


def test_the_refusal_names_the_scheme_and_not_the_token(guarded: str) -> None:
    with closing(http.client.HTTPConnection(guarded, timeout=20)) as connection:
        connection.request("POST", "/flush_cache", b"x" * 100)
        response = connection.getresponse()
        body = response.read().decode()
    assert (response.status, response.getheader("WWW-Authenticate")) == (401, 'Bearer realm="kvroom admin"')
    assert "needs `Authorization: Bearer TOKEN`, with the token of its KVROOM_ADMIN_TOKEN_FILE or " in body
    assert TOKEN.decode() not in body
    assert TOKEN.decode() not in repr(Admission(token=TOKEN))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "LocalHost", "localhost.:80", "[::1]:80", "127.9.9.9"])
def test_without_a_token_this_machine_is_answered(source: str, host: str) -> None:
    assert say(source, f"Host: {host}") == 200


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: evil.example",),
        ("Host: 127.0.0.1.evil.example:80",),
        ("Host: localhost.evil.example",),
        ("Host: 0.0.0.0",),
        ("Host: 10.0.0.1",),
        ("Host: [fd00::1]:80",),
        ("Host: evil.example@127.0.0.1",),
        ("Host: http://127.0.0.1",),
        ("Host:",),
        (),
        ("Host: 127.0.0.1", "Host: evil.example"),
    ],
)
def test_a_name_that_was_rebound_is_refused(source: str, lines: tuple[str, ...]) -> None:
    assert say(source, *lines) in (400, 403)


@pytest.mark.parametrize(
    "line",
    [
        "Origin: http://evil.example",
        "Origin: null",
        "Origin: http://localhost:3000",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ],
)
def test_a_web_page_is_refused(source: str, line: str) -> None:
    assert say(source, f"Host: {source}", line) == 403


@pytest.mark.parametrize("line", ["Sec-Fetch-Site: none", "Sec-Fetch-Site: same-origin"])
def test_a_browser_that_was_pointed_at_it_is_answered(source: str, line: str) -> None:
    assert say(source, f"Host: {source}", line) == 200
    assert say(source, f"Host: {source}", f"Origin: http://{source}") == 200


def test_the_refusal_of_a_name_is_one_sentence(source: str) -> None:
    said = ask(source, "/rooms", Host="evil.example")
    assert (said.status, said.error) == (
        403,
        "Host 'evil.example' is not loopback: send the request to 127.0.0.1",
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "worker-3"])
def test_beyond_loopback_a_token_is_required(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is not loopback and needs a token: set KVROOM_ADMIN_TOKEN_FILE"):
        Admission(host)
    Admission(host, TOKEN)


@pytest.mark.parametrize("token", [b"short", "text of a token, not bytes"])
def test_a_token_that_protects_nothing_is_refused_and_not_shown(token: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"too short to be safe|give bytes") as caught:
        Admission("127.0.0.1", token)
    assert str(token) not in str(caught.value)

"""A directory's address may come from a client, so no error, log line or response shows our credentials or the text of
that server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from urllib.parse import quote

import pytest

from kvroom.bootstrap import client, sign
from kvroom.bootstrap.directory import RankInfo
from kvroom.errors import BootstrapError
from kvroom.wire.address import HostPort

SECRET = b"a secret that is long enough"
RANK = RankInfo(rank_ip="127.0.0.1", rank_port=1, page_size=16)
BANNER = "internal-host-42"
Answer = Callable[[str], bytes]
"""A function from the Authorization header of a request to the bytes that a server answers."""


def reply(body: str, status: str = "200 OK", header: str = "") -> bytes:
    data = body.encode()
    return f"HTTP/1.1 {status}\r\n{header}Content-Length: {len(data)}\r\n\r\n".encode() + data


def mac(signature: str) -> str:
    return signature.rpartition(":")[2]


RANK_SAYING = '{"ranks": [{"rank_ip": %s, "rank_port": 1, "page_size": 16}]}'
ANSWERS: dict[str, Answer] = {
    "no HTTP": lambda signature: f"SSH-2.0 {BANNER} {signature}\r\n\r\n".encode(),
    "no status": lambda signature: f"HTTP/1.1 {signature}\r\n\r\n".encode(),
    "bad header": lambda signature: f"HTTP/1.1 200 OK\r\n{BANNER} {signature}\r\n\r\n".encode(),
    "long header": lambda signature: f"HTTP/1.1 200 OK\r\nX: {signature * 300}\r\n\r\n".encode(),
    "bad length": lambda signature: f"HTTP/1.1 200 OK\r\nContent-Length: {signature}\r\n\r\n".encode(),
    "bad chunks": lambda signature: f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{signature}\r\n".encode(),
    "bad coding": lambda signature: reply(signature, header="Content-Encoding: deflate\r\n"),
    "bad cookie": lambda signature: reply(signature, header=f"Set-Cookie: {signature}=;;==\xff\r\n"),
    "switching": lambda signature: f"HTTP/1.1 101 {signature}\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n".encode(),
    "redirect": lambda signature: reply("", "307 T", f"Location: http://127.0.0.1:1/{quote(signature)}\r\n"),
    "refusal": lambda signature: reply(json.dumps({"error": f"{BANNER} {signature}"}), "403 Forbidden"),
    "refusal, banner": lambda _signature: reply(json.dumps({"error": BANNER}), "403 Forbidden"),
    "refusal, no JSON": lambda _signature: reply(BANNER, "500 Oops"),
    "refusal, mac": lambda signature: reply(json.dumps({"error": mac(signature).upper()}), "409 Conflict"),
    "refusal, parted": lambda signature: reply(json.dumps({"error": " ".join(mac(signature))}), "401 Unauthorized"),
    "refusal, base64": lambda signature: reply(
        json.dumps({"error": base64.b64encode(b"x" + bytes.fromhex(mac(signature))).decode()}), "503 Busy"
    ),
    "refusal, retry": lambda signature: reply(json.dumps({"error": signature, "retry": True}), "503 Busy"),
    "no list": lambda signature: reply(json.dumps(signature)),
    "no host": lambda signature: reply(RANK_SAYING % json.dumps(f"{BANNER} {signature}")),
    "no number": lambda signature: reply(RANK_SAYING % f'"a", "pp_size": {json.dumps(signature)}'),
    "no JSON": lambda signature: reply(f"{BANNER} {signature}"),
    "no room": lambda signature: reply(json.dumps({signature: 1})),
}


async def _answer(answer: Answer, ask: Callable[[str], object], seen: list[str]) -> BaseException | None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        (line,) = [line for line in head.splitlines() if line.startswith("Authorization: ")]
        seen.append(line.removeprefix("Authorization: "))
        writer.write(answer(seen[-1]))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        where = str(HostPort.of_socket(server.sockets[0].getsockname()))
        try:
            await ask(where)  # type: ignore[misc]
        except BootstrapError as error:
            return error
    return None


ASKED: dict[str, Callable[[str], object]] = {
    "list": lambda where: client.lookup(where, secret=SECRET, timeout_s=2),
    "rooms": lambda where: client.query_dp_ranks(where, [1], secret=SECRET, timeout_s=2),
    "register": lambda where: client.register(where, RANK, secret=SECRET, timeout_s=2),
    "deregister": lambda where: client.deregister(where, RANK, secret=SECRET, timeout_s=2),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("ask", ASKED)
def test_no_answer_brings_our_signature_into_an_error_or_a_log(
    ask: str, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    error = asyncio.run(_answer(ANSWERS[answer], ASKED[ask], seen))
    shown = f"{error} {error!r} {caplog.text}".lower()
    signature = seen[0]
    proof = mac(signature)
    assert len(proof) == 64
    for text in (signature, proof, proof[:16], proof[-16:], " ".join(proof[:16])):
        assert text.lower() not in shown
    assert base64.b64encode(b"x" + bytes.fromhex(proof)).decode()[4:20].lower() not in shown
    if ask in ("list", "rooms"):  # if a client may have chosen the server, its text is not repeated
        assert BANNER not in shown


def test_a_refusal_of_an_engines_own_directory_is_repeated_once_it_is_proven() -> None:
    """The operator has named this directory, and needs the reason: the engine that has the place."""
    body = json.dumps({"error": "the rank is registered by 10.0.0.7:8998"})

    def refuse(signature: str) -> bytes:
        nonce = bytes.fromhex(signature.split(":")[1])
        proof = sign.sign_answer(SECRET, nonce, 409, body.encode())
        return reply(body, "409 Conflict", f"{sign.ANSWER_HEADER}: {proof}\r\n")

    error = asyncio.run(_answer(refuse, ASKED["register"], []))
    assert str(error).endswith("refused PUT /route (409): the rank is registered by 10.0.0.7:8998")
    error = asyncio.run(_answer(lambda _signature: reply(body, "409 Conflict"), ASKED["register"], []))
    assert "10.0.0.7" not in str(error)
    assert "the refusal is not signed" in str(error)

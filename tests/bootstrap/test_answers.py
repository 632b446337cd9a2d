"""A client with a secret accepts only a response that the directory has signed for this request.

Between the client and a real directory is an attacker without the secret, which forwards requests and changes the
responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from kvroom.bootstrap import client, sign
from kvroom.bootstrap.directory import Directory, RankInfo
from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.errors import BootstrapError
from kvroom.wire import auth
from kvroom.wire.address import HostPort, parse_address

SECRET = b"a secret that is long enough"
OTHER_SECRET = b"another secret, long enough"
RANK = RankInfo(rank_ip="10.0.0.1", rank_port=7000, page_size=16)
BANNER = "internal-host-42"
NOT_PROVEN = "ignored the answer of .* check that the directory is at this address.*KVROOM_SECRET"
Change = Callable[[bytes], bytes]


@asynccontextmanager
async def attacker(directory: str, change: Change) -> AsyncIterator[str]:
    """Forward requests to a directory and serve its responses after `change`."""
    where = parse_address(directory)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(where.host, where.port)
        ours.write(await _read_message(reader))
        writer.write(change(await _read_message(theirs)))
        ours.close()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield str(HostPort.of_socket(server.sockets[0].getsockname()))


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return head + (await reader.readexactly(int(length[1])) if length else b"")


def with_body(answer: bytes, body: bytes) -> bytes:
    head = answer.partition(b"\r\n\r\n")[0]
    return re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % len(body), head) + b"\r\n\r\n" + body


def with_proof(answer: bytes, proof: bytes) -> bytes:
    header = sign.ANSWER_HEADER.encode()
    changed, count = re.subn(header + rb": [0-9a-f]{64}", header + b": " + proof, answer)
    assert count == 1
    return changed


def unsigned(answer: bytes) -> bytes:
    changed, count = re.subn(sign.ANSWER_HEADER.encode() + rb": [0-9a-f]{64}\r\n", b"", answer)
    assert count == 1
    return changed


CHANGES: dict[str, Change] = {
    "unsigned": unsigned,
    "unsigned, other list": lambda answer: unsigned(with_body(answer, b'{"ranks": []}')),
    "other body": lambda answer: with_body(answer, json.dumps({"1": 7, "ranks": [], "refused": BANNER}).encode()),
    "no body": lambda answer: with_body(answer, b""),
    "longer body": lambda answer: with_body(answer, answer.partition(b"\r\n\r\n")[2] + b" "),
    "empty proof": lambda answer: with_proof(answer, b""),
    "short proof": lambda answer: with_proof(answer, b"00"),
    "zero proof": lambda answer: with_proof(answer, b"0" * 64),
    "odd proof": lambda answer: with_proof(answer, BANNER.encode()),
    "other status": lambda answer: answer.replace(b" 200 OK", b" 201 OK", 1),
}
ASKED: dict[str, Callable[[str], Awaitable[Any]]] = {
    "list": lambda where: client.listed(where, secret=SECRET),
    "rooms": lambda where: client.query_dp_ranks(where, [1], secret=SECRET),
    "waiting": lambda where: client.query_dp_ranks(where, [1], wait_s=30, secret=SECRET),
    "hint": lambda where: client.register_dp_rank(where, 1, 0, secret=SECRET),
    "hints": lambda where: client.register_dp_ranks(where, {1: 0}, secret=SECRET),
    "register": lambda where: client.register(where, RANK, secret=SECRET),
    "deregister": lambda where: client.deregister(where, RANK, secret=SECRET),
}


async def _directory(stack: contextlib.AsyncExitStack, **settings: Any) -> str:
    server = await stack.enter_async_context(KVBootstrapServer(**{"secret": SECRET, **settings}))
    assert await client.register(server.address, RANK, secret=settings.get("secret", SECRET)) == ""
    await client.register_dp_rank(server.address, 1, 0, secret=settings.get("secret", SECRET))
    return server.address


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ask", ASKED)
def test_an_answer_that_was_changed_is_refused_and_not_shown(ask: str, change: str) -> None:
    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            real = await _directory(stack)
            where = await stack.enter_async_context(attacker(real, CHANGES[change]))
            with pytest.raises(BootstrapError) as refused:
                await ASKED[ask](where)
            told = str(refused.value)
            assert where in told
            assert BANNER not in told
            if change == "other status":
                assert "(201)" in told
                assert "the refusal is not signed" in told
            else:
                assert re.search(NOT_PROVEN, told)

    asyncio.run(body())


@pytest.mark.parametrize("ask", ASKED)
def test_an_answer_that_passed_unchanged_is_believed(ask: str) -> None:
    """Without a change the response passes the attacker, so the other tests show that the change is what is refused."""

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            real = await _directory(stack)
            where = await stack.enter_async_context(attacker(real, lambda answer: answer))
            believed = {"list": [RANK], "rooms": {1: 0}, "waiting": {1: 0}, "register": ""}
            assert await ASKED[ask](where) == believed.get(ask)

    asyncio.run(body())


@pytest.mark.parametrize("ask", ["list", "rooms", "hint", "register"])
def test_an_older_answer_is_refused(ask: str) -> None:
    async def body() -> None:
        recorded: list[bytes] = []

        def replay(answer: bytes) -> bytes:
            recorded.append(answer)
            return recorded[0]

        async with contextlib.AsyncExitStack() as stack:
            where = await stack.enter_async_context(attacker(await _directory(stack), replay))
            await ASKED[ask](where)
            with pytest.raises(BootstrapError, match=NOT_PROVEN):
                await ASKED[ask](where)

    asyncio.run(body())


def test_a_refusal_cannot_be_made_an_answer_nor_its_words_be_changed() -> None:
    """The refusal of a place that another engine holds is signed, and that signature verifies for no other response."""

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            real = await _directory(stack, directory=Directory(max_ranks=1))
            full = RankInfo(rank_ip="10.0.0.1", rank_port=7001, page_size=16, attn_tp_size=1, pp_rank=0, pp_size=2)
            changes: dict[Change, str] = {
                lambda answer: re.sub(rb" (409|503) [^\r]*", b" 200 OK", answer, count=1): NOT_PROVEN,
                lambda answer: with_body(answer, json.dumps({"error": BANNER, "retry": True}).encode()): "not signed",
                unsigned: "the refusal is not signed",
            }
            for change, told in changes.items():
                async with attacker(real, change) as where:
                    with pytest.raises(BootstrapError, match=told) as refused:
                        await client.register(where, full, secret=SECRET, timeout_s=10)
                    assert BANNER not in str(refused.value)
                    assert type(refused.value) is BootstrapError  # an unsigned response is no reason to retry

    asyncio.run(body())


def test_a_directory_with_another_secret_is_refused_with_the_remedy() -> None:
    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            where = await _directory(stack, secret=OTHER_SECRET)
            for ask in ("list", "register"):
                with pytest.raises(BootstrapError) as refused:
                    await ASKED[ask](where)
                told = str(refused.value)
                assert "does not accept the signature: give this worker the directory's secret, KVROOM_SECRET" in told
                assert "set both clocks" in told
                assert told.endswith(
                    "the refusal is not signed, so it may come from another server: check the address, too"
                )

    asyncio.run(body())


def test_a_directory_without_a_secret_is_not_believed() -> None:
    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            where = await _directory(stack, secret=b"")
            with pytest.raises(
                BootstrapError, match=f"ignored the answer of .*{re.escape(where)} to GET /route, .*KVROOM_SECRET"
            ):
                await client.listed(where, secret=SECRET)

    asyncio.run(body())


def test_clocks_that_differ_are_told_with_proof() -> None:
    """The secret is right, so the refusal is signed and the client can trust it."""

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            where = await _directory(stack)
            signed = sign.Signed(int(time.time()) - 2 * sign.REPLAY_WINDOW_S, auth.new_nonce())
            headers = {sign.HEADER: sign.sign(SECRET, "GET", "/route", b"", signed)}
            session = await stack.enter_async_context(aiohttp.ClientSession())
            async with session.get(f"http://{where}/route", headers=headers) as response:
                told = await response.read()
                assert response.status == 401
                assert b"set the clocks to within 30 s" in told
                proof = response.headers[sign.ANSWER_HEADER]
            assert sign.is_proven(SECRET, proof, signed.nonce, 401, told)

    asyncio.run(body())


def test_a_nonce_of_a_stranger_is_not_signed() -> None:
    """Otherwise an attacker could choose a nonce and have a response to it signed."""

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            where = await _directory(stack)
            good = sign.sign(SECRET, "GET", "/route", b"", sign.Signed(int(time.time()), auth.new_nonce()))
            time_s, nonce, mac = good.split(":")
            session = await stack.enter_async_context(aiohttp.ClientSession())
            for header in (f"{time_s}:{bytes(32).hex()}:{mac}", f"{time_s}:{nonce}:{bytes(32).hex()}", "KVRoom"):
                async with session.get(f"http://{where}/route", headers={sign.HEADER: header}) as response:
                    assert response.status == 401
                    assert sign.ANSWER_HEADER not in response.headers

    asyncio.run(body())

"""The directory over real HTTP: SGLang's routes, clear refusals, and a client whose errors name address and cause."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from kvroom.bootstrap import client, sign
from kvroom.bootstrap.directory import Directory, RankInfo, Undecided
from kvroom.bootstrap.http import MAX_BODY_BYTES, KVBootstrapServer
from kvroom.core.messages import Message, Peer
from kvroom.errors import BootstrapError, ConfigurationError
from kvroom.runtime.link import Links
from kvroom.wire.address import parse_address
from kvroom.wire.frames import Inquiry

SECRET = b"a secret for tests, long enough"
RANK = RankInfo(rank_ip="10.0.0.1", rank_port=7000, page_size=16, kv_cache_dtype="bfloat16")
SGLANG_BODY = {
    "attn_tp_size": 1,
    "attn_tp_rank": 0,
    "attn_cp_size": 1,
    "attn_cp_rank": 0,
    "attn_dp_size": 1,
    "attn_dp_rank": 0,
    "pp_size": 1,
    "pp_rank": 0,
    "system_dp_size": 1,
    "system_dp_rank": 0,
    "rank_ip": "10.0.0.1",
    "rank_port": "7000",
    "page_size": 16,
    "kv_cache_dtype": "auto",
    "load_balance_method": "round_robin",
    "a_field_of_a_later_version": True,
}

Ask = Callable[..., Awaitable[tuple[int, Any]]]


def run(test: Callable[[KVBootstrapServer, Ask], Awaitable[None]], secret: bytes = b"", **limits: Any) -> None:
    """Run a test's body and a server on a new event loop; `ask` sends one request, unsigned by default."""

    async def body() -> None:
        async with (
            KVBootstrapServer(secret=secret, directory=Directory(**limits)) as server,
            aiohttp.ClientSession() as session,
        ):

            async def ask(method: str, path: str, data: Any = None, headers: Any = None) -> tuple[int, Any]:
                data = data if isinstance(data, bytes) or data is None else msgspec.json.encode(data)
                url = f"http://{server.address}{path}"
                async with session.request(method, url, data=data, headers=headers) as response:
                    text = await response.read()
                    assert ("Retry-After" in response.headers) == (response.status == 503)
                    assert ("Allow" in response.headers) == (response.status == 405)
                    is_json = response.content_type == "application/json"
                    return response.status, msgspec.json.decode(text) if is_json else text.decode()

            await test(server, ask)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


class Silent:
    """A `LinkHandler` that does nothing."""

    def on_up(self, peer: Peer, identity: bytes) -> None: ...
    def on_lost(self, peer: Peer, detail: str) -> None: ...
    def on_message(self, peer: Peer, seq: int, message: Message | Inquiry) -> None: ...


@asynccontextmanager
async def rank_process(port: int = 0) -> AsyncIterator[tuple[Links, dict[str, Any]]]:
    """Yield the links of a prefill rank, and the fields of its registration that name its address and its run."""
    links = Links(Silent(), identity=b"", port=port)
    me = await links.start()
    where = parse_address(me.address)
    try:
        yield links, {"rank_ip": where.host, "rank_port": where.port, "incarnation": me.incarnation}
    finally:
        await links.close()


ELSEWHERE = {**SGLANG_BODY, "rank_ip": "127.0.0.1", "rank_port": 1, "incarnation": 77}
"""A rank of another engine, or of the same engine after a restart."""


def test_a_second_engine_is_refused_and_the_first_is_told_with_its_next_refresh() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        async with rank_process() as (links, living):
            assert await ask("PUT", "/route", {**SGLANG_BODY, **living}) == (200, "OK")
            status, answer = await ask("PUT", "/route", ELSEWHERE)
            assert status == 409
            assert f"another prefill engine at {links.me.address}, which is alive: one directory" in answer["error"]
            assert "127.0.0.1:1 a directory of its own" in answer["error"]
            assert await ask("PUT", "/route", {**SGLANG_BODY, **living}) == (200, {"refused": "127.0.0.1:1"})
            assert await ask("PUT", "/route", {**SGLANG_BODY, **living}) == (200, "OK")
            assert [rank["rank_port"] for rank in (await ask("GET", "/route"))[1]["ranks"]] == [living["rank_port"]]
        assert await ask("PUT", "/route", ELSEWHERE) == (200, "OK")  # the first engine has ended, within its lease
        assert [rank["rank_port"] for rank in (await ask("GET", "/route"))[1]["ranks"]] == [1]

    run(test)


def test_another_run_at_the_old_address_is_no_life_sign_of_the_old_run() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        async with rank_process() as (_, living):
            old = {**SGLANG_BODY, **living, "incarnation": living["incarnation"] ^ 1}
            assert await ask("PUT", "/route", old) == (200, "OK")
            assert await ask("PUT", "/route", ELSEWHERE) == (200, "OK")

    run(test)


def test_all_ranks_of_an_engine_that_has_ended_make_way_for_one_of_another_shape() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        async with rank_process() as (_, one), rank_process() as (_, two):
            for tp, living in enumerate((one, two)):
                rank = {**SGLANG_BODY, **living, "attn_tp_size": 2, "attn_tp_rank": tp}
                assert await ask("PUT", "/route", rank) == (200, "OK")
            assert (await ask("PUT", "/route", {**ELSEWHERE, "attn_tp_size": 4, "attn_tp_rank": 3}))[0] == 409
        assert await ask("PUT", "/route", {**ELSEWHERE, "attn_tp_size": 4, "attn_tp_rank": 3}) == (200, "OK")
        assert [rank["attn_tp_size"] for rank in (await ask("GET", "/route"))[1]["ranks"]] == [4]

    run(test)


@pytest.mark.parametrize("says", [b"", b"220 mail.example ESMTP\r\n", bytes(8), b"\x00\x00\x00\x01\xc0"])
def test_a_rival_that_does_not_answer_as_a_manager_keeps_its_lease_and_the_newcomer_may_ask_again(says: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        await reader.read()
        writer.close()

    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as other:
            port = other.sockets[0].getsockname()[1]
            assert await ask("PUT", "/route", {**SGLANG_BODY, "rank_ip": "127.0.0.1", "rank_port": port}) == (200, "OK")
            status, answer = await ask("PUT", "/route", ELSEWHERE)
            assert (status, answer["retry"]) == (503, True)
            assert re.search(rf"127\.0\.0\.1:{port}, which does not answer: .* ends, in (30|29) s", answer["error"])
            with pytest.raises(Undecided, match="which does not answer"):
                await client.register(server.address, msgspec.convert(ELSEWHERE, RankInfo))

    run(test)


def test_a_rank_that_ends_takes_itself_out_and_nobody_else() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        rank = msgspec.convert(ELSEWHERE, RankInfo)
        await client.register(server.address, rank)
        await client.deregister(server.address, msgspec.structs.replace(rank, incarnation=78))
        await client.deregister(server.address, msgspec.structs.replace(rank, rank_port=2))
        assert await client.listed(server.address) == [rank]
        await client.deregister(server.address, rank)
        await client.deregister(server.address, rank)
        assert await client.listed(server.address) == []
        assert (await ask("DELETE", "/route", b"{"))[0] == 400

    run(test)


def test_sglang_s_routes_answer_as_its_clients_expect() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        everything = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
        assert await ask("GET", "/health") == (200, "OK")
        assert (await ask("GET", everything))[0] == 503
        assert await ask("PUT", "/route", SGLANG_BODY) == (200, "OK")
        status, info = await ask("GET", everything)
        assert (status, info) == (
            200,
            {
                "attn_tp_size": 1,
                "attn_cp_size": 1,
                "dp_size": 1,
                "pp_size": 1,
                "page_size": 16,
                "kv_cache_dtype": "auto",
                "follow_bootstrap_room": False,
                "enable_dsa_cache_layer_split": False,
                "prefill_http_port": None,
            },
        )
        status, found = await ask("GET", "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0")
        assert status == 200
        assert (found["rank_ip"], found["rank_port"]) == ("10.0.0.1", 7000)
        assert (await ask("GET", everything.replace("tp_rank=-1", "tp_rank=5").replace("-1", "0")))[0] == 404
        assert await ask("POST", "/register_dp_rank", {"bootstrap_room": 2**63 - 1, "dp_rank": 3}) == (200, "OK")
        assert await ask("POST", "/query_dp_ranks", {"bootstrap_rooms": [1, 2**63 - 1]}) == (200, {str(2**63 - 1): 3})

    run(test)


def test_the_client_registers_looks_up_and_hints() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        address = server.address
        with pytest.raises(BootstrapError, match=f"{address} lists 0 of 1 prefill ranks: is the prefill worker up"):
            await client.lookup(address, secret=SECRET)
        await client.register(address, RANK, secret=SECRET)
        assert await client.lookup(address, secret=SECRET) == [RANK]
        await client.register_dp_rank(address, 9, 4, secret=SECRET)
        assert await client.query_dp_ranks(address, [8, 9], secret=SECRET) == {9: 4}
        await client.register_dp_ranks(address, {8: 1, 9: 2}, secret=SECRET)
        assert await client.query_dp_ranks(address, [8, 9], wait_s=30, secret=SECRET) == {8: 1, 9: 2}

    run(test, secret=SECRET)


def test_without_the_right_signature_nothing_is_read_or_changed() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        assert await ask("GET", "/health") == (200, "OK")
        for method, path, body in (
            ("PUT", "/route", SGLANG_BODY),
            ("DELETE", "/route", SGLANG_BODY),
            ("GET", "/route", None),
            ("POST", "/register_dp_rank", {"bootstrap_room": 1, "dp_rank": 0}),
            ("POST", "/register_dp_ranks", {"dp_ranks": {1: 0}}),
            ("POST", "/query_dp_ranks", {"bootstrap_rooms": [1]}),
            ("GET", "/nowhere", None),
        ):
            status, answer = await ask(method, path, body)
            assert status == 401
            assert "not signed" in answer["error"]
        for secret in (b"", b"a wrong secret, long enough"):
            with pytest.raises(BootstrapError, match=r"refused PUT /route \(401\): .*KVROOM_SECRET"):
                await client.register(server.address, RANK, secret=secret)
        stale = sign.sign(
            SECRET, "GET", "/route", b"", sign.Signed(int(time.time()) - 2 * sign.REPLAY_WINDOW_S, bytes(32))
        )
        status, answer = await ask("GET", "/route", headers={sign.HEADER: stale})
        assert status == 401
        assert "set the clocks" in answer["error"]
        with pytest.raises(BootstrapError, match="lists 0 of 1"):
            await client.lookup(server.address, secret=SECRET)

    run(test, secret=SECRET)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("PUT", "/route", b"", 400, "PUT /route: Input data was truncated"),
        ("PUT", "/route", b"\xff", 400, "malformed"),
        ("PUT", "/route", b"[" * 100_000, 400, "PUT /route"),
        ("PUT", "/route", {**SGLANG_BODY, "rank_port": "x"}, 400, "$.rank_port"),
        ("PUT", "/route", {**SGLANG_BODY, "attn_tp_rank": 1}, 400, "attn_tp_rank is 1, must be in [0, 1)"),
        ("PUT", "/route", {"rank_ip": "h"}, 400, "missing required field `rank_port`"),
        ("PUT", "/route", b"x" * (MAX_BODY_BYTES + 1), 413, f"the body is larger than {MAX_BODY_BYTES} bytes"),
        ("GET", "/route?prefill_dp_rank=0", None, 400, "prefill_cp_rank is missing"),
        (
            "GET",
            "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=zero&target_pp_rank=0",
            None,
            400,
            "target_tp_rank is 'zero'",
        ),
        ("POST", "/route", b"{}", 405, "Method Not Allowed"),
        ("GET", "/nowhere", None, 404, "Not Found"),
        ("POST", "/register_dp_rank", {"bootstrap_room": -1, "dp_rank": 0}, 400, "$.bootstrap_room"),
        ("POST", "/query_dp_ranks", {"bootstrap_rooms": ["many"]}, 400, "$.bootstrap_rooms[0]"),
        ("POST", "/query_dp_ranks", {"bootstrap_rooms": [0] * 5000}, 400, "length <= 4096"),
        ("POST", "/query_dp_ranks", {"bootstrap_rooms": [], "wait_s": 31}, 400, "$.wait_s"),
        ("POST", "/query_dp_ranks", b'{"bootstrap_rooms": [], "wait_s": NaN}', 400, "JSON is malformed"),
        ("POST", "/register_dp_ranks", {"dp_ranks": {"-1": 0}}, 400, "POST /register_dp_ranks: "),
        ("POST", "/register_dp_ranks", {"dp_ranks": {"1": 4096}}, 400, "$.dp_ranks"),
        ("POST", "/register_dp_ranks", {"dp_ranks": {str(n): 0 for n in range(4097)}}, 400, "length <= 4096"),
    ],
)
def test_a_bad_request_is_refused_by_what_is_wrong_with_it(
    method: str, path: str, body: Any, status: int, says: str
) -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        found, answer = await ask(method, path, body)
        assert found == status
        assert says in answer["error"]
        assert await ask("GET", "/route") == (200, {"ranks": []})

    run(test)


def run_waiting(test: Callable[[KVBootstrapServer, Watched], Awaitable[None]], max_waiting: int = 8) -> None:
    """Like `run`, with a directory that signals each look-up of a query. At the end no query may be waiting."""

    async def body() -> None:
        directory = Watched()
        async with KVBootstrapServer(directory=directory, max_waiting=max_waiting) as server:
            await test(server, directory)
            assert not server._waiters
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


class Watched(Directory):
    def __init__(self) -> None:
        super().__init__()
        self.looks: asyncio.Queue[list[int]] = asyncio.Queue()

    def query_dp_ranks(self, rooms: Any, now_s: float) -> dict[int, int]:
        self.looks.put_nowait(list(rooms))
        return super().query_dp_ranks(rooms, now_s)


def query(server: KVBootstrapServer, rooms: list[int], wait_s: float) -> asyncio.Task[dict[int, int]]:
    return asyncio.create_task(client.query_dp_ranks(server.address, rooms, wait_s=wait_s))


def test_a_query_that_waits_is_answered_when_the_first_of_its_rooms_is_registered() -> None:
    async def test(server: KVBootstrapServer, directory: Watched) -> None:
        early = query(server, [1, 2], 30)
        late = query(server, [3, 4], 30)
        assert sorted([await directory.looks.get(), await directory.looks.get()]) == [[1, 2], [3, 4]]
        await client.register_dp_rank(server.address, 9, 5)
        await client.register_dp_rank(server.address, 2, 6)  # SGLang sends this form
        assert await early == {2: 6}
        assert directory.looks.qsize() == 1, "the registration of another room woke a query"
        assert not late.done()
        await client.register_dp_ranks(server.address, {3: 1, 4: 2, 5: 3})
        assert await late == {3: 1, 4: 2}
        assert await client.query_dp_ranks(server.address, [5, 6], wait_s=30) == {5: 3}

    run_waiting(test)


def test_a_query_that_waits_in_vain_ends_in_time_with_nothing() -> None:
    async def test(server: KVBootstrapServer, directory: Watched) -> None:
        start_s = time.monotonic()
        assert await client.query_dp_ranks(server.address, [1], wait_s=0.2) == {}
        assert time.monotonic() - start_s >= 0.2

    run_waiting(test)


def test_queries_over_the_limit_are_refused_and_a_hang_up_makes_room() -> None:
    async def test(server: KVBootstrapServer, directory: Watched) -> None:
        waiting = query(server, [1], 30)
        await directory.looks.get()
        with pytest.raises(
            BootstrapError, match=r"\(503\): it has reached a limit of open files, waiting queries or hints"
        ):
            await client.query_dp_ranks(server.address, [2], wait_s=30)
        assert await client.query_dp_ranks(server.address, [2]) == {}
        waiting.cancel()
        start_s = time.monotonic()
        answer: dict[int, int] | BaseException = BootstrapError()
        while isinstance(answer, BootstrapError):  # the server notices the closed connection some turns later
            (answer,) = await asyncio.gather(query(server, [2], 0.001), return_exceptions=True)
        assert answer == {}
        assert time.monotonic() - start_s < 15, "the query ended by itself after its 30 s, not with its asker"

    run_waiting(test, max_waiting=1)


def test_closing_answers_the_queries_that_wait() -> None:
    async def test(server: KVBootstrapServer, directory: Watched) -> None:
        waiting = query(server, [1], 30)
        await directory.looks.get()
        await server.aclose()
        assert await waiting == {}

    run_waiting(test)


def test_limits_and_contradictions_have_their_own_status() -> None:
    async def test(server: KVBootstrapServer, ask: Ask) -> None:
        async with rank_process() as (_, living):
            two = {**SGLANG_BODY, **living, "attn_tp_size": 2}
            assert (await ask("PUT", "/route", two))[0] == 200
            status, answer = await ask("PUT", "/route", {**two, "attn_tp_rank": 1, "page_size": 32})
            assert status == 409
            assert "page_size 32 (not 16)" in answer["error"]
            assert (await ask("PUT", "/route", {**two, "attn_tp_rank": 1}))[0] == 503

    run(test, max_ranks=1)


def test_a_server_with_its_own_thread_starts_and_ends_cleanly() -> None:
    before = threading.active_count()
    server = KVBootstrapServer(secret=SECRET)
    with pytest.raises(ConfigurationError, match="no address while it does not run"):
        _ = server.address
    with server:
        with pytest.raises(ConfigurationError, match="already runs on"):
            server.start()
        asyncio.run(client.register(server.address, RANK, secret=SECRET))
        assert asyncio.run(client.lookup(server.address, secret=SECRET)) == [RANK]
    server.close()
    assert threading.active_count() == before
    with server:
        assert asyncio.run(client.lookup(server.address, secret=SECRET)) == [RANK]


def test_a_port_in_use_or_an_open_address_without_a_secret_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = KVBootstrapServer(port=port)
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is in use"):
            server.start()
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is in use"):
            asyncio.run(server.serve())
    with server:
        assert server.address == f"127.0.0.1:{port}"
    with pytest.raises(ConfigurationError, match=r"0\.0\.0\.0 is not loopback and needs a shared secret"):
        KVBootstrapServer("0.0.0.0")


def test_a_client_says_which_directory_failed_and_how() -> None:
    async def lookup(address: str, says: str) -> None:
        with pytest.raises(BootstrapError, match=says):
            await client.lookup(address, timeout_s=0.2)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()

    answers = [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + bytes(5 << 20),
    ]

    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            address = f"127.0.0.1:{deaf.getsockname()[1]}"
            await lookup(address, rf"timed out after 0\.2 s: bootstrap directory {address} did not answer: is it up\?")
        await lookup(address, rf"{address}: connection refused; is it up\?")
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await lookup(address, f"{address}: its answer is not valid HTTP")
            await lookup(address, f"unexpected answer from bootstrap directory {address}")
            await lookup(address, rf"{address} refused GET /route \(500\): no reason given; is this a kvroom")
            await lookup(address, f"{address} is larger than 4194304 bytes")
        with pytest.raises(ConfigurationError, match="write host:port"):
            await client.lookup("nonsense")

    asyncio.run(body())


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused_before_anything_starts(port: int) -> None:
    with pytest.raises(ConfigurationError, match=f"port {port} for the bootstrap directory is not in"):
        KVBootstrapServer(port=port)

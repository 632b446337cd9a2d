"""API keys: the clients that may send requests to a worker and to the router in front of it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.pair import Pair
from engine.tiny import tiny
from kvroom.serve.app import ModelCard
from kvroom.serve.probe import Probe
from kvroom.serve.schema import RoomEnd

from .conftest import SIZES
from .helpers import START_S, Process, command, environment, get, run, running
from .helpers import begin_post as begin
from .helpers import finish as answer
from .test_large_bodies import ADMIN_URL, ROLES, ROUTED, TOKENS, no_partner

FIRST, SECOND, WRONG = "the-first-key-of-clients", "the-second-key-of-clients", "a-key-that-is-not-listed"
KEYED = ("/generate", "/v1/completions", "/v1/chat/completions")
OPEN = ("/health", "/server_info", "/model_info", "/get_server_info", "/get_model_info")


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Process]:
    with running("decode", "--model", str(model_dir), *SIZES, KVROOM_API_KEY=f"{FIRST} {SECOND}") as process:
        yield process


def status_of(url: str, path: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with begin(url, path, {}, headers) as connection:
        return answer(connection).status


@pytest.mark.parametrize("path", KEYED)
def test_requests_need_a_key(worker: Process, path: str) -> None:
    for key in (None, "", WRONG, FIRST[:-1], f"{FIRST}x", f"{FIRST} {SECOND}"):
        assert status_of(worker.url, path, key) == 401
    for key in (FIRST, SECOND):
        assert status_of(worker.url, path, key) == 400  # the body requests no tokens


def test_models_are_listed_with_a_key_and_the_rest_without(worker: Process) -> None:
    assert get(worker.url, "/v1/models").status == 401
    assert get(worker.url, "/v1/models", {"Authorization": f"Bearer {SECOND}"}).status == 200
    assert [get(worker.url, path).status for path in OPEN] == [200] * len(OPEN)
    assert get(worker.url, "/workers").status == 404


def test_the_refusal_has_openais_form_and_shows_no_key(worker: Process) -> None:
    with begin(worker.url, "/v1/completions", {}, {"Authorization": f"Bearer {WRONG}"}) as connection:
        said = answer(connection)
    assert (said.status, said.headers["www-authenticate"]) == (401, "Bearer")
    error = said.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    info = get(worker.url, "/server_info").text
    assert not [key for key in (FIRST, SECOND, WRONG) if key in said.text + info]


def test_the_answer_comes_before_the_body(worker: Process) -> None:
    where = urlsplit(worker.url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=20) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("role", list(ROLES))
def test_a_call_without_a_key_is_told_to_no_other_worker(role: str) -> None:
    async def ask(pair: Pair) -> tuple[list[int], list[int]]:
        engine = pair.prefill if role == "prefill" else pair.decode
        worker = ROLES[role](engine, ModelCard("m", "m", TOKENS, 4), Probe(engine, no_partner))
        told: list[int] = []

        def hear(legs: Sequence[RoomEnd], detail: str) -> None:
            told.extend(leg.room for leg in legs)

        worker.refused = hear
        async with TestClient(TestServer(worker.application(ADMIN_URL, [FIRST.encode()]))) as client:
            statuses, heard = [], []
            for key in (WRONG, FIRST):
                headers = {"Authorization": f"Bearer {key}"}
                body = {**ROUTED, "model": "m", "prompt": "x", "seed": "no number"}
                statuses.append((await client.post("/v1/completions", json=body, headers=headers)).status)
                heard.append(len(told))
            return statuses, heard

    with Pair(tiny().loaded) as pair:
        assert asyncio.run(ask(pair)) == ([401, 400], [0, 1])


def test_up_gives_the_keys_to_workers_and_router_and_shows_them_nowhere(model_dir: Path) -> None:
    keys = ("--api-key", FIRST, "--api-key", SECOND)
    with running("up", "--port", "0", "--model", str(model_dir), *SIZES, *keys, "--verbose") as up:
        body = {"model": up.ready.facts["model"], "prompt": "Hello", "max_tokens": 4}
        for key, status in ((None, 401), (WRONG, 401), (FIRST, 200), (SECOND, 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            with begin(up.url, "/v1/completions", body, headers) as connection:
                said = answer(connection)
            assert said.status == status, said.text
            if status == 401:
                assert said.json()["error"]["code"] == "invalid_api_key"
        shown = run("rooms", up.url, KVROOM_API_KEY=f"{FIRST} {SECOND}")
        assert (shown.returncode, shown.stderr) == (0, "")
        missing, wrong = run("rooms", up.url), run("rooms", up.url, KVROOM_API_KEY=WRONG)
        assert missing.stderr.startswith(f"kvroom rooms: {up.url}: it lists its workers only for its first API key: ")
        assert wrong.stderr.startswith(f"kvroom rooms: {up.url}: it refused the API key of KVROOM_API_KEY_FILE or ")
        (_, *children) = up.family()
        commands = [" ".join(child.cmdline()) for child in children]
        assert len(commands) == 3
        _, errors = up.end()
    assert not [key for key in (FIRST, SECOND, WRONG) if key in " ".join([*commands, errors])]


def test_the_router_shows_its_key_in_no_list_of_processes_while_it_starts() -> None:
    """smg changes its process title when it runs; until then every user can read its arguments."""
    workers = ("--prefill", "http://127.0.0.1:1", "2", "--decode", "http://127.0.0.1:3")
    with subprocess.Popen(
        command("router", "--port", "0", *workers), env=environment(KVROOM_API_KEY=FIRST), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as router:  # fmt: skip
        try:
            seen, end = {""}, time.monotonic() + START_S
            while not any("smg::router" in line for line in seen):
                assert time.monotonic() < end
                seen.add(" ".join(psutil.Process(router.pid).cmdline()))
        finally:
            router.kill()
    assert any("--pd-disaggregation" in line for line in seen)
    assert not any(FIRST in line for line in seen)

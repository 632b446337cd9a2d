"""A client's request id and traceparent are found on both workers: in logs, /stats, rooms, headers and errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from kvroom.cli.cluster import wait_for_router
from kvroom.cli.ports import free_port

from .conftest import SECRET, SIZES
from .helpers import (
    END_S,
    Process,
    Response,
    assert_idle,
    begin_post,
    command,
    environment,
    finish,
    get,
    look,
    running_with_log,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NAMES = {"X-Request-Id": "client-7", "traceparent": PARENT}
BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
LONG = {**BODY, "max_tokens": 240, "ignore_eos": True, "stream": True}


class Traced(NamedTuple):
    """Two workers with fixed ports behind a router, whose logs are files."""

    url: str
    workers: dict[str, Process]
    logs: dict[str, Path]
    ports: dict[str, set[int]]
    metrics_port: int

    def records(self, role: str, request_id: str) -> list[Any]:
        """Return the log records of a worker about a request."""
        records = [json.loads(line) for line in self.logs[role].read_text().splitlines() if line.startswith("{")]
        return [record for record in records if record.get("request_id") == request_id]

    def ended(self, role: str, request_id: str) -> list[Any]:
        """Return the entries of a worker's /stats about a request."""
        recent = look(self.workers[role].url, "/stats").json()["recent"]
        return [entry for entry in recent if entry.get("request_id") == request_id]


def ask(url: str, body: Any, path: str = "/v1/completions", **headers: str) -> Response:
    with begin_post(url, path, body, headers) as connection:
        return finish(connection)


@pytest.fixture(scope="module")
def traced(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("logs")
    workers: dict[str, Process] = {}
    ports: dict[str, set[int]] = {}
    with ExitStack() as stack:
        for role in ("prefill", "decode"):
            fixed = {name: free_port("127.0.0.1") for name in ("--port", "--admin-port", "--link-port")}
            if role == "prefill":
                fixed["--bootstrap-port"] = free_port("127.0.0.1")
            data_port = free_port("127.0.0.1")
            given = [text for name, port in fixed.items() for text in (name, str(port))]
            given += ["--transport", "tcp", "--transport-option", f"port={data_port}"]
            log = stack.enter_context((folder / role).open("w"))
            workers[role] = stack.enter_context(
                running_with_log(
                    log, role, "--model", str(model_dir), *SIZES, *given,
                    "--log-level", "debug", "--log-format", "json",
                    KVROOM_SECRET=SECRET,
                )
            )  # fmt: skip
            ports[role] = {*fixed.values(), data_port}
        prefill, decode = workers["prefill"], workers["decode"]
        port, metrics_port = free_port("127.0.0.1"), free_port("127.0.0.1")
        router = stack.enter_context(
            subprocess.Popen(
                command(
                    "router", "--port", str(port), "--policy", "random",
                    "--prefill", prefill.url, prefill.ready.facts["bootstrap_port"], "--decode", decode.url,
                    "--", "--log-json", "--prometheus-port", str(metrics_port),
                ),
                env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(wait_for_router(url, 2))
            yield Traced(url, workers, {role: folder / role for role in workers}, ports, metrics_port)
            assert_idle([prefill.url, decode.url])
        finally:
            router.kill()
            router.wait(timeout=END_S)


def test_a_worker_listens_at_the_given_ports_and_no_other(traced: Traced) -> None:
    for role, worker in traced.workers.items():
        (process,) = worker.family()
        listening = {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
        assert listening == traced.ports[role]
        # The partner of a probe takes ports of its own.
        assert get(worker.url, "/health_generate").text == "ok"


def test_what_follows_two_hyphens_reaches_smg(traced: Traced) -> None:
    assert get(f"http://127.0.0.1:{traced.metrics_port}", "/metrics").status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_success_is_found_by_its_name_on_both_workers(traced: Traced, stream: bool) -> None:
    name = f"success-{stream}"
    response = ask(traced.url, {**BODY, "stream": stream}, **{**NAMES, "X-Request-Id": name})
    assert response.status == 200
    assert response.headers["x-request-id"] == name
    assert_idle([worker.url for worker in traced.workers.values()])
    for role in traced.workers:
        (entry,) = traced.ended(role, name)
        assert (entry["traceparent"], entry["outcome"], entry["error"]) == (PARENT, "succeeded", None)
        assert (entry["index"], entry["nbytes"] > 0) == (0, True)
        now = look(traced.workers[role].url, "/stats").json()["now"]
        assert now - 60 < entry["ended_at"] <= now
        records = traced.records(role, name)
        assert {record["traceparent"] for record in records} == {PARENT}
        assert entry["room"] in {record.get("room") for record in records}
        assert any(record["message"].startswith("POST /v1/completions was answered with 200") for record in records)


def test_a_failure_is_found_by_its_name_on_both_workers(traced: Traced) -> None:
    name = "failure"
    with begin_post(
        traced.url,
        "/v1/completions",
        {**LONG, "max_tokens": 200, "prompt": ["a", "b"]},
        {**NAMES, "X-Request-Id": name},
    ) as connection:
        assert connection.getresponse().readline().startswith(b"data: ")
    assert_idle([worker.url for worker in traced.workers.values()])
    entries = traced.ended("decode", name)
    assert {(entry["outcome"], entry["index"]) for entry in entries} == {("failed", 0), ("failed", 1)}
    assert all(entry["error"] == "cancelled: the client of the decode worker left" for entry in entries)
    assert any("was cancelled: the client left" in record["message"] for record in traced.records("decode", name))


def test_a_hand_off_that_fails_names_the_request_on_both_sides(traced: Traced) -> None:
    prefill, decode = traced.workers["prefill"], traced.workers["decode"]
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": int(prefill.ready.facts["bootstrap_port"])}
    names = {**NAMES, "X-Request-Id": "mismatch"}
    with begin_post(prefill.url, "/v1/completions", {**BODY, **room, "bootstrap_room": 77}, names) as connection:
        other = {**BODY, **room, "bootstrap_room": 77, "prompt": "Other"}
        answers = [ask(decode.url, other, **names), finish(connection)]
    for role, answer in zip(("decode", "prefill"), answers, strict=True):
        assert (answer.status, answer.headers["retry-after"], answer.headers["x-request-id"]) == (503, "1", "mismatch")
        error = answer.json()["error"]
        assert error["request_id"] == "mismatch"
        (entry,) = traced.ended(role, "mismatch")
        assert (entry["room"], entry["outcome"], entry["error"]) == (77, "failed", error["message"])
        failures = [record for record in traced.records(role, "mismatch") if record.get("cause")]
        assert [(record["room"], record["cause"], record["traceparent"]) for record in failures] == [
            (77, "identity_mismatch", PARENT)
        ]


def test_an_open_room_shows_the_name(traced: Traced) -> None:
    prefill = traced.workers["prefill"]
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 78}
    with begin_post(prefill.url, "/v1/completions", {**BODY, **room}, NAMES):
        assert look(prefill.url, "/rooms?phase=EXPECTED&within_s=20").status == 200
        shown = look(prefill.url, "/rooms/78").json()
        (view,) = shown["views"]
        assert (view["request_id"], view["traceparent"]) == ("client-7", PARENT)
        assert look(prefill.url, "/rooms?oldest=5").json()["now"] >= shown["now"]


FORGED = ["x" * 129, "a b", "a\tb", "\xe9", "", "a\xa0b"]


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_invalid_name_is_replaced(traced: Traced, role: str, name: str) -> None:
    answer = ask(traced.workers[role].url, {}, **{"X-Request-Id": name, "traceparent": "01-" + PARENT})
    assert answer.status == 400
    own = answer.headers["x-request-id"]
    assert (len(own), answer.json()["error"]["request_id"]) == (32, own)
    (record,) = traced.records(role, own)
    assert "traceparent" not in record


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({"rid": "by-rid", "request_id": "by-id"}, {}, "by-rid"),
        ({"request_id": "by-id"}, {}, "by-id"),
        ({"rid": "by-rid"}, {"X-Request-Id": "by-header"}, "by-header"),
        ({"rid": "a b", "request_id": "by-id"}, {}, "by-id"),
    ],
)
def test_without_a_header_the_body_names_the_request(
    traced: Traced, fields: dict[str, str], headers: dict[str, str], expected: str
) -> None:
    answer = ask(traced.workers["decode"].url, {**BODY, **fields, "max_tokens": 0}, **headers)
    assert (answer.status, answer.headers["x-request-id"]) == (400, expected)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_unknown_model_is_404_with_openais_code(traced: Traced, role: str) -> None:
    other = "decode" if role == "prefill" else "prefill"
    room: dict[str, Any] = {"bootstrap_host": "127.0.0.1", "bootstrap_room": 90 + len(role)}
    room["bootstrap_port"] = int(traced.workers["prefill"].ready.facts["bootstrap_port"])
    with begin_post(traced.workers[other].url, "/v1/completions", {**BODY, **room}, NAMES) as waiting:
        answer = ask(traced.workers[role].url, {**BODY, **room, "model": "gpt-4"}, **NAMES)
        told = finish(waiting)
    assert told.status == 503
    assert "model='gpt-4' is not served here" in told.text
    error = answer.json()["error"]
    assert answer.status == 404
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert error["message"] == "model='gpt-4' is not served here; use 'tiny'"


def test_behind_smg_an_unknown_model_is_smgs_own_503(traced: Traced) -> None:
    answer = ask(traced.url, {**BODY, "model": "gpt-4"}, **{"X-Request-Id": "no-model"})
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "no_available_workers"
    assert traced.records("prefill", "no-model") == traced.records("decode", "no-model") == []


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/completions", 405, "GET /v1/completions: method not allowed; use POST"),
        ("DELETE", "/v1/models", 405, "DELETE /v1/models: method not allowed; use GET, HEAD"),
        ("POST", "/health", 405, "POST /health: method not allowed; use GET, HEAD"),
        ("GET", "/v1/embeddings", 404, "GET /v1/embeddings: unknown route on this port"),
    ],
)
def test_a_wrong_method_or_route_is_an_error_in_openais_form(
    traced: Traced, method: str, path: str, status: int, words: str
) -> None:
    with begin_post(traced.workers["decode"].url, path, b"", NAMES, method=method) as connection:
        answer = finish(connection)
    error = answer.json()["error"]
    assert (answer.status, error["message"], error["request_id"]) == (status, words, "client-7")
    assert answer.headers.get("allow") == (words.partition("; use ")[2] or None)

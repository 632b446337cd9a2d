"""The workers' side of the contract with the router, without one: order of the legs, failures, and their reports."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .conftest import SECRET, SIZES, Served
from .helpers import Process, Response, assert_idle, begin_post, finish, get, look, post, running

ROOMS = itertools.count(1)
PATH = "/v1/completions"


def bootstrap_port(served: Served) -> int:
    workers = get(served.url, "/workers").json()["workers"]
    port: int = next(one["bootstrap_port"] for one in workers if one["worker_type"] == "prefill")
    return port


def body_for(served: Served, **fields: Any) -> dict[str, Any]:
    """Return a request body as a router sends it, with a new room."""
    routed = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap_port(served), "bootstrap_room": next(ROOMS)}
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0, **routed, **fields}


def wait_until(url: str, holds: Callable[[dict[str, Any]], bool]) -> None:
    """Poll a worker's `/rooms` until `holds` is true of it; no event outside of the worker shows it."""
    for _ in range(2000):
        said = look(url, "/rooms").json()
        if holds(said):
            return
    raise AssertionError(f"{url} still says {said}")


def wait_for_room(url: str, room: int) -> None:
    """Wait until a worker has opened a room."""
    wait_until(url, lambda said: any(one["room"] == room for one in said["open"]))


def error_of(response: Response) -> str:
    message: str = response.json()["error"]["message"]
    return message


def test_what_a_router_asks_about_a_worker(served: Served) -> None:
    for url, role in ((served.prefill, "prefill"), (served.decode, "decode")):
        assert get(url, "/health").status == 200
        (model,) = get(url, "/v1/models").json()["data"]
        assert (model["id"], model["owned_by"]) == ("tiny", "sglang")
        info = get(url, "/server_info").json()
        assert info["disaggregation_mode"] == role
        assert info["max_running_requests"] > 0
        assert get(url, "/model_info").json()["is_generation"]
        assert get(url, "/version").status == 404


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_either_side_may_come_first(served: Served, first: str) -> None:
    body = body_for(served, bootstrap_room=2**63 - 1)
    early, late = (served.prefill, served.decode) if first == "prefill" else (served.decode, served.prefill)
    with begin_post(early, PATH, body) as waiting:
        wait_for_room(early, body["bootstrap_room"])
        answers = {early: None, late: post(late, PATH, body)}
        answers[early] = finish(waiting)
    decoded, prefilled = answers[served.decode], answers[served.prefill]
    assert decoded is not None
    assert prefilled is not None
    assert decoded.json()["choices"][0]["text"]
    assert prefilled.json()["choices"] == []
    assert prefilled.json()["kvroom"][0]["pages"] == 2


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_who_waits_alone_gets_503_in_bounded_time(served: Served, side: str) -> None:
    response = post(served.prefill if side == "prefill" else served.decode, PATH, body_for(served))
    assert response.status == 503
    assert response.headers["retry-after"] == "1"
    assert "room" in error_of(response)


def test_a_prefill_client_that_hung_up_is_no_silence_for_the_decode_side(served: Served) -> None:
    body = body_for(served)
    with begin_post(served.prefill, PATH, body):
        wait_for_room(served.prefill, body["bootstrap_room"])
    wait_until(served.prefill, lambda said: said["parting"] == 1)
    response = post(served.decode, PATH, body)
    assert response.status == 503
    assert "the client of the prefill worker left" in error_of(response)


def test_a_decode_that_hangs_up_ends_the_prefill(served: Served) -> None:
    body = body_for(served)
    with begin_post(served.decode, PATH, body):
        wait_for_room(served.decode, body["bootstrap_room"])
    wait_until(served.decode, lambda said: all(one["room"] != body["bootstrap_room"] for one in said["open"]))
    response = post(served.prefill, PATH, body)
    assert response.status == 503
    assert "room" in error_of(response)


def test_a_second_request_for_an_open_room_is_refused_and_the_first_is_served(served: Served) -> None:
    body = body_for(served)
    with begin_post(served.decode, PATH, body) as first:
        wait_for_room(served.decode, body["bootstrap_room"])
        second = post(served.decode, PATH, body)
        assert second.status == 503
        assert str(body["bootstrap_room"]) in error_of(second)
        assert post(served.prefill, PATH, body).status == 200
        assert finish(first).status == 200


def test_errors_have_openais_shape_and_come_in_chunks(served: Served) -> None:
    response = post(served.decode, PATH, body_for(served, top_p=2))
    assert response.status == 400
    error = response.json()["error"]
    assert error.pop("request_id") == response.headers["x-request-id"]
    assert error == {
        "message": "top_p=2 is not allowed: expected `float` <= 1.0",
        "type": "invalid_request_error",
        "param": "top_p",
        "code": None,
    }
    # smg lengthens the body and keeps the old Content-Length.
    assert "content-length" not in response.headers


def test_requests_that_are_no_requests(served: Served) -> None:
    assert get(served.decode, "/v1/completions").status == 405
    assert "POST" in error_of(post(served.decode, "/nowhere", {}))
    assert post(served.decode, PATH, b"x" * (5 << 20)).status == 413
    assert look(served.decode, "/rooms?idle_within_s=soon").status == 400
    assert "not served here" in error_of(post(served.decode, PATH, body_for(served, model="other")))


def test_a_prompt_longer_than_this_pool_is_400_and_the_other_side_hears_it(served: Served, model_dir: Path) -> None:
    small = ("--page-tokens", "4", "--pages", "8", "--bootstrap-s", "3", "--max-waiting", "3")
    with running("prefill", "--model", str(model_dir), *small, KVROOM_SECRET=SECRET) as prefill:
        port = int(prefill.ready.facts["bootstrap_port"])
        body = body_for(served, prompt="x" * 64, bootstrap_port=port)
        with begin_post(served.decode, PATH, body) as waiting:
            wait_for_room(served.decode, body["bootstrap_room"])
            refused = post(prefill.url, PATH, body)
            told = finish(waiting)
        for _ in range(10):  # no decode worker joins these rooms: only `--max-waiting` of them are kept
            assert post(prefill.url, PATH, body_for(served, prompt="x" * 64)).status == 400
        assert 0 < look(prefill.url, "/rooms").json()["parting"] <= 3
        assert_idle([prefill.url])
    assert refused.status == 400
    assert "16 pages for 64 tokens and the pool has 8" in error_of(refused)
    assert told.status == 503
    assert error_of(refused) in error_of(told)


@pytest.fixture
def stranger(model_dir: Path, tmp_path: Path) -> Iterator[Process]:
    """Yield a decode worker with another secret than the cluster's."""
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text("another secret of enough bytes")
    with running("decode", "--model", str(model_dir), "--secret-file", str(secret), *SIZES) as process:
        yield process


def test_a_worker_with_a_wrong_secret_is_refused_with_words(served: Served, stranger: Process) -> None:
    response = post(stranger.url, PATH, body_for(served))
    assert response.status == 503
    assert "KVROOM_SECRET" in error_of(response)
    assert_idle([stranger.url])


BAD_HOSTS: list[Any] = [
    "http://127.0.0.1",
    "127.0.0.1:8998",
    "a b",
    "x" * 254,
    "127.0.0.1/../",
    "-",
    "",
    "[::1",
    "1.2.3",
    "::",
    "a\n",
    5,
    {},
]


def test_a_bad_bootstrap_host_is_400_on_both_sides_before_anything_is_computed(served: Served) -> None:
    """One test for all hosts: each leaves a room until its bootstrap timeout, and so these times overlap."""
    computed = look(served.prefill, "/rooms").json()["prompt_tokens_computed"]
    for host, url in itertools.product(BAD_HOSTS, (served.prefill, served.decode)):
        response = post(url, PATH, body_for(served, bootstrap_host=host))
        assert response.status == 400, f"{host!r} at {url}: {response.text}"
        assert response.json()["error"]["param"] == "bootstrap_host", f"{host!r} at {url}: {response.text}"
    assert look(served.prefill, "/rooms").json()["prompt_tokens_computed"] == computed


@pytest.mark.parametrize("host", ["[::1]", "localhost", "127.0.0.1", "::ffff:127.0.0.1"])
def test_a_host_is_the_same_in_every_form(served: Served, host: str) -> None:
    """The cluster listens at 127.0.0.1 only, so `[::1]` is a valid host at which no directory listens."""
    body = body_for(served, bootstrap_host=host)
    with begin_post(served.prefill, PATH, body) as prefill:
        decoded = post(served.decode, PATH, body)
        assert decoded.status == finish(prefill).status == (503 if host == "[::1]" else 200)


REFUSED_LEGS: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 2}, "top_p=2 is not allowed"),
    ({"anything": 1}, "anything=1 is not an option of this server"),
    ({"model": "other"}, "model='other' is not served here"),
    ({"max_tokens": 300}, "lower max_tokens"),
    ({"prompt": ["Hello", 5]}, "prompt mixes token ids with whole prompts"),
]


@pytest.mark.parametrize(
    ("side", "fields", "words"),
    [
        *((side, *leg) for side in ("prefill", "decode") for leg in REFUSED_LEGS),
        ("prefill", {"bootstrap_host": "a b"}, "'a b' is not a host"),
    ],
)
def test_a_side_that_refuses_a_body_tells_the_other(
    served: Served, side: str, fields: dict[str, Any], words: str
) -> None:
    refuses, waits = (served.prefill, served.decode) if side == "prefill" else (served.decode, served.prefill)
    body = body_for(served)
    with begin_post(waits, PATH, body) as waiting:
        wait_for_room(waits, body["bootstrap_room"])
        assert post(refuses, PATH, {**body, **fields}).status == (404 if "model" in fields else 400)
        told = finish(waiting)
    assert told.status == 503
    assert words in error_of(told)


def test_every_room_of_a_refused_batch_is_told(served: Served) -> None:
    body = body_for(served, prompt=["Hello", "abc"], n=2)
    with begin_post(served.decode, PATH, body) as waiting:
        wait_until(served.decode, lambda said: len(said["open"]) == 4)
        assert post(served.prefill, PATH, {**body, "seed": "x"}).status == 400
        assert 'seed="x" is not allowed' in error_of(finish(waiting))


@pytest.mark.parametrize("n", [1, 3])
def test_the_prefill_side_counts_a_prompt_once(served: Served, n: int) -> None:
    body = body_for(served, prompt=["Hello", "abc"], n=n)
    with begin_post(served.prefill, PATH, body) as prefill:
        decoded = post(served.decode, PATH, body).json()
        prefilled = finish(prefill).json()
    assert decoded["usage"]["prompt_tokens"] == prefilled["usage"]["prompt_tokens"] == 8
    assert decoded["usage"]["prompt_tokens_details"] == prefilled["usage"]["prompt_tokens_details"]
    assert len(prefilled["kvroom"]) == 2 * n


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_malformed_body_is_400_in_json(served: Served, side: str, path: str) -> None:
    url = served.prefill if side == "prefill" else served.decode
    for raw in (b'{"prompt": "a\xff"}', b"\x80", b'{"a": "\\ud800"}', b"[" * 500, b'{"a": 1e999}', b"", b"null", b"\0"):
        response = post(url, path, raw)
        assert response.status == 400, raw
        assert response.headers["content-type"].startswith("application/json")
        assert error_of(response).startswith("the body is")


def test_a_body_whose_encoding_is_a_lie_is_400_in_json(served: Served) -> None:
    with begin_post(served.decode, PATH, b"not gzip at all", {"Content-Encoding": "gzip"}) as connection:
        response = finish(connection)
    assert response.status == 400
    assert "the body cannot be read" in error_of(response)


def test_more_requests_than_may_wait_are_refused(served: Served, model_dir: Path) -> None:
    few = (*SIZES, "--max-running", "1", "--max-waiting", "1")
    with running("decode", "--model", str(model_dir), *few, KVROOM_SECRET=SECRET) as decode:
        bodies = [body_for(served) for _ in range(3)]
        with begin_post(decode.url, PATH, bodies[0]) as first, begin_post(decode.url, PATH, bodies[1]) as second:
            wait_for_room(decode.url, bodies[0]["bootstrap_room"])
            refused = post(decode.url, PATH, bodies[2])
            first.close()
            second.close()
        assert_idle([decode.url])
    assert refused.status == 503
    assert "limit" in error_of(refused)


def test_a_stream_that_cannot_start_is_an_error_with_a_status(served: Served) -> None:
    response = post(served.decode, PATH, body_for(served, stream=True))
    assert response.status == 503
    assert json.loads(response.text)["error"]["type"] == "server_error"


def test_workers_listen_where_they_say(served: Served) -> None:
    assert {urlsplit(url).hostname for url in (served.url, served.prefill, served.decode)} == {"127.0.0.1"}

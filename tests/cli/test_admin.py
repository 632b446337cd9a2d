"""The admin address of a worker: routes that only this address has, and servers that `kvroom rooms` sends the token."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.helpers import Process, get, post, run, running

LOOPBACK = "127.0.0.1"
TOKEN = "the-token-of-an-operator"
OTHER = "the-token-of-another-one"
SIZES = ("--page-tokens", "4", "--pages", "64")
ROUTES = ("/rooms", "/rooms/7", "/rooms?oldest=1", "/stats", "/doctor", "/metrics")


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Yield a worker with a token, whose admin address is on every interface."""
    token = tmp_path_factory.mktemp("admin") / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    hosts = ("--admin-host", "0.0.0.0", "--advertise-host", "localhost")
    with running("decode", "--model", str(model_dir), *SIZES, *hosts, KVROOM_ADMIN_TOKEN_FILE=str(token)) as worker:
        yield worker


def test_the_client_port_has_none_of_it(guarded: Process) -> None:
    for path in ROUTES:
        answer = get(guarded.url, path)
        assert (answer.status, answer.json()["error"]["message"]) == (
            404,
            f"GET {path.partition('?')[0]}: unknown route on this port",
        )
    assert post(guarded.url, "/flush_cache", {}).status == 404
    for path in ("/health", "/v1/models", "/server_info", "/model_info"):
        assert get(guarded.url, path).status == 200


def test_the_admin_address_has_all_of_it_for_the_token_alone(guarded: Process) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for path in ROUTES:
        assert get(guarded.admin, path).status == 401
        assert get(guarded.admin, path, {"Authorization": f"Bearer {OTHER}"}).status == 401
        assert get(guarded.admin, path, bearer).status == (404 if path == "/rooms/7" else 200)
    assert post(guarded.admin, "/flush_cache", {}).status == 401
    assert get(guarded.admin, "/v1/models", bearer).status == 404


def test_the_ready_line_and_server_info_name_the_admin_url(guarded: Process) -> None:
    info = get(guarded.url, "/server_info")
    assert info.json()["admin_url"] == guarded.admin
    assert guarded.admin.startswith("http://localhost:")
    assert TOKEN not in info.text


def test_rooms_and_doctor_use_the_token_of_the_environment(guarded: Process, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(run("doctor", "--json").stdout)
    for url in (guarded.url, guarded.admin):
        shown = run("rooms", url, KVROOM_ADMIN_TOKEN=TOKEN)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.splitlines()[-1].rstrip() == "0 rooms open"
        compared = run("doctor", "--between", url, str(mine), KVROOM_ADMIN_TOKEN=TOKEN)
        assert (compared.returncode, compared.stderr) == (0, "")


def test_a_token_that_is_missing_or_wrong_is_one_sentence(guarded: Process) -> None:
    for url, role in ((guarded.url, "decode worker "), (guarded.admin, "")):
        missing = run("rooms", url)
        assert (missing.returncode, missing.stderr) == (
            3,
            f"kvroom rooms: {role}{url}: its admin address {guarded.admin} needs a token: set KVROOM_ADMIN_TOKEN_FILE "
            "or KVROOM_ADMIN_TOKEN to the worker's token\n",
        )
        wrong = run("rooms", url, KVROOM_ADMIN_TOKEN=OTHER)
        assert wrong.returncode == 3
        (line,) = wrong.stderr.splitlines()
        assert f"{guarded.admin} refused the token of KVROOM_ADMIN_TOKEN_FILE or KVROOM_ADMIN_TOKEN" in line
        assert OTHER not in line


def test_a_web_page_cannot_flush_the_cache_of_a_worker_on_loopback(model_dir: Path) -> None:
    with running("decode", "--model", str(model_dir), *SIZES) as worker:
        assert get(worker.admin, "/rooms", {"Host": "rebound.example"}).status == 403
        assert get(worker.admin, "/rooms", {"Origin": "http://evil.example"}).status == 403
        assert get(worker.admin, "/rooms").status == 200
        assert get(worker.url, "/health", {"Host": "worker.example"}).status == 200


class _Liar(http.server.BaseHTTPRequestHandler):
    """A server that answers each path with a given status and body, and records the `Authorization` headers."""

    pages: dict[str, tuple[int, object]]
    heard: list[str | None]

    def do_GET(self) -> None:
        self.heard.append(self.headers.get("Authorization"))
        status, said = self.pages.get(self.path.partition("?")[0], (404, {}))
        body = json.dumps(said).encode()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", str(said))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


@contextmanager
def lying(pages: dict[str, tuple[int, object]]) -> Iterator[tuple[int, list[str | None]]]:
    """Run such a server on every interface; yield its port and the list of recorded headers."""
    heard: list[str | None] = []
    handler = type("_", (_Liar,), {"pages": pages, "heard": heard})
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], heard
        finally:
            server.shutdown()
            thread.join()


CHALLENGE = 'Bearer realm="kvroom admin"'


def test_the_token_goes_to_no_host_that_only_a_worker_names() -> None:
    """Connections to 0.0.0.0 reach this machine too, but for the client it is another host than 127.0.0.1."""
    with lying({"/rooms": (401, CHALLENGE)}) as (port, heard):
        elsewhere = f"http://0.0.0.0:{port}"
        with lying({"/server_info": (200, {"admin_url": elsewhere})}) as (worker, _):
            done = run("rooms", f"http://{LOOPBACK}:{worker}", KVROOM_ADMIN_TOKEN=TOKEN)
            assert done.returncode == 3
            assert f"is on another host than http://{LOOPBACK}:{worker}, and the token is sent only to" in done.stderr
            assert set(heard) == {None}
        run("rooms", elsewhere, KVROOM_ADMIN_TOKEN=TOKEN)
        assert f"Bearer {TOKEN}" in heard  # this time the operator has named the host


@pytest.mark.parametrize("challenge", ["Bearer", 'Bearer realm="another"', 'Basic realm="kvroom admin"'])
def test_the_token_answers_the_challenge_of_admin_addresses_alone(challenge: str) -> None:
    with lying({"/rooms": (401, challenge)}) as (port, heard):
        done = run("rooms", f"http://{LOOPBACK}:{port}", KVROOM_ADMIN_TOKEN=TOKEN)
        assert (done.returncode, set(heard)) == (3, {None})


def test_the_workers_of_a_router_are_shown_and_one_that_is_gone_is_a_line(guarded: Process) -> None:
    with lying({}) as (gone, _):
        listed = [{"url": guarded.url}, {"url": f"http://{LOOPBACK}:{gone}", "worker_type": "prefill"}]
        with lying({"/workers": (200, {"workers": listed})}) as (router, _):
            done = run("rooms", f"http://{LOOPBACK}:{router}", KVROOM_ADMIN_TOKEN=TOKEN)
    assert done.returncode == 3
    assert "0 rooms open" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvroom rooms: prefill worker http://{LOOPBACK}:{gone}: answered 404: ")


def test_a_router_without_workers_is_said_to_have_none() -> None:
    with lying({"/workers": (200, {"workers": []})}) as (router, _):
        url = f"http://{LOOPBACK}:{router}"
        done = run("rooms", url)
    assert done.returncode == 3
    assert done.stdout.rstrip().endswith(", no worker answered")
    assert done.stderr == (
        f"kvroom rooms: {url}: this router has no workers: start workers, then the router with their URLs\n"
    )


def test_an_admin_url_that_is_none_is_one_sentence() -> None:
    for named in ("", "http://[::1", "ftp://127.0.0.1:9"):
        with lying({"/server_info": (200, {"admin_url": named})}) as (port, _):
            done = run("rooms", f"http://{LOOPBACK}:{port}", KVROOM_ADMIN_TOKEN=TOKEN)
            assert done.returncode == 3
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"kvroom rooms: http://{LOOPBACK}:{port}: its admin URL is invalid: ")

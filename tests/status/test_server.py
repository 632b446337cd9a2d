"""A status server on real managers: its responses, its refusals, its start and its end."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families as read_text

from identities import PROMPT
from kvroom import Audit
from kvroom.cli.activity import OpenRooms
from kvroom.errors import ConfigurationError
from kvroom.status.server import StatusServer
from kvroom.wire.address import parse_address

from .status_helpers import Pair, ask

ROOM = 77
TOKEN = b"a token of the operator, 32 bytes".replace(b" ", b"-")


def test_a_room_that_waits_is_shown_with_what_it_waits_for(pair: Pair, source: str) -> None:
    with pair.prefill.sender(ROOM, identity=PROMPT):
        said = ask(source, "/rooms").json()
        assert [(view["room"], view["phase"]) for view in said["open"]] == [(ROOM, "EXPECTED")]
        assert said["rooms"]["sources"] == 1
        assert said["engine"] == "ours"
        (view,) = ask(source, f"/rooms/{ROOM}").json()["views"]
        assert view["waits_for"] == "a decode worker to offer pages"
        assert 0 < view["waits_until_s"] <= 60
    gone = ask(source, f"/rooms/{ROOM}")
    assert gone.status == 404
    assert gone.error.startswith(f"room {ROOM} is not open on this worker")


def test_it_says_when_everything_is_empty(pair: Pair, source: str, sink: str) -> None:
    nothing = msgspec.to_builtins(Audit())
    pair.hand_over(ROOM)
    for address in (source, sink):
        said = ask(address, "/rooms?idle_within_s=10")
        assert said.status == 200
        assert (said.json()["rooms"], said.json()["open"]) == (nothing, [])
    with pair.decode.receiver(pair.addr, ROOM, identity=PROMPT):
        said = ask(sink, "/rooms?idle_within_s=0.05")
        assert said.status == 503
        assert said.json()["rooms"] != nothing
        assert [view["room"] for view in said.json()["open"]] == [ROOM]


def test_a_wait_longer_than_a_turn_ends_when_all_is_idle(pair: Pair, source: str) -> None:
    sender = pair.prefill.sender(ROOM, identity=PROMPT)
    later = threading.Timer(0.8, sender.clear)
    later.start()
    before = time.monotonic()
    assert ask(source, "/rooms?idle_within_s=30").status == 200
    assert 0.5 < time.monotonic() - before < 20
    later.join()


def test_nothing_is_kept_of_who_waited_in_vain(pair: Pair, source: str) -> None:
    with pair.prefill.sender(ROOM, identity=PROMPT):
        assert ask(source, "/rooms?idle_within_s=0.01").status == 503
        assert not pair.prefill.wait_idle(0.0)
        until(lambda: pair.prefill.driver._idle_waiters == [])  # the shared look has ended


def test_many_that_wait_hold_up_no_other_request(pair: Pair, source: str) -> None:
    """They share one thread. With a thread for each they would occupy the whole pool of threads for half a minute."""
    where = parse_address(source)
    with ExitStack() as stack:
        stack.enter_context(pair.prefill.sender(ROOM, identity=PROMPT))
        for _ in range(400):
            waiting = stack.enter_context(socket.create_connection(where, timeout=20))
            waiting.sendall(b"GET /rooms?idle_within_s=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for path in ("/rooms?oldest=1", "/metrics", "/health", f"/rooms/{ROOM}"):
            with closing(http.client.HTTPConnection(source, timeout=10)) as other:
                other.request("GET", path)
                assert other.getresponse().status == 200


def test_a_room_is_awaited_by_phase(pair: Pair, source: str) -> None:
    said = []
    waiting = threading.Thread(target=lambda: said.append(ask(source, "/rooms?phase=EXPECTED&within_s=20")))
    waiting.start()
    with pair.prefill.sender(ROOM, identity=PROMPT):
        waiting.join()
        assert ask(source, "/rooms?phase=SENDING&within_s=0.01").status == 503
    assert said[0].status == 200
    assert [view["phase"] for view in said[0].json()["open"]] == ["EXPECTED"]


def test_the_oldest_are_shown_and_all_are_counted(pair: Pair, source: str) -> None:
    pair.hand_over(ROOM)
    with (
        pair.prefill.sender(1, identity=PROMPT),
        pair.prefill.sender(2, identity=PROMPT),
        pair.prefill.sender(3, identity=PROMPT),
    ):
        said = ask(source, "/rooms?oldest=2").json()
        assert (said["kept"], [view["room"] for view in said["open"]]) == (3, [1, 2])
        counts = said["counts"]
        assert (counts["opened"], counts["ended"], counts["handed_over"]) == (4, {"": 1}, 1)
        assert counts["handoff_s"] > 0.0
        assert counts["nbytes"] > 0
        assert said["engine"] == "ours"
        assert "rooms" not in said  # `oldest` avoids counting all rooms


@pytest.mark.parametrize(
    ("path", "status", "param", "words"),
    [
        ("/rooms?oldest=0", 400, "oldest", "give a whole number in [1, 10000]"),
        ("/rooms?phase=Busy&within_s=1", 400, "phase", "phase='Busy': give one of NEW, "),
        ("/rooms?idle_within_s=61", 400, "idle_within_s", "idle_within_s='61': give seconds in (0, 60]"),
        (f"/rooms/{2**63}", 400, "room", "invalid room number"),
        ("/generate", 404, None, "GET /generate: unknown route on this port"),
    ],
)
def test_what_cannot_be_answered_is_one_json_error(
    source: str, path: str, status: int, param: str | None, words: str
) -> None:
    said = ask(source, path)
    assert (said.status, said.json()["error"]["param"]) == (status, param)
    assert words in said.error


def test_it_is_only_a_window(source: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        said = ask(source, "/rooms", method)
        assert (said.status, said.error) == (405, f"{method} /rooms: method not allowed; use GET, HEAD")


def test_metrics_are_those_of_the_manager(pair: Pair, source: str, sink: str) -> None:
    moved = pair.hand_over(ROOM)
    for address, side in ((source, "prefill"), (sink, "decode")):
        page = ask(address, "/metrics")
        assert page.content_type.startswith("text/plain")
        samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in read_text(page.text)
            for sample in family.samples
        }
        assert samples["kvroom_handoff_bytes_total", frozenset({("side", side)})] == moved > 0
        ended = frozenset({("side", side), ("outcome", "succeeded"), ("cause", "")})
        assert samples["kvroom_rooms_ended_total", ended] == 1
        assert samples["process_resident_memory_bytes", frozenset()] > 1 << 20


def test_without_prometheus_only_the_metrics_are_missing(
    pair: Pair, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kvroom.status.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    said = ask(source, "/metrics")
    assert said.status == 500
    assert "/metrics needs prometheus-client (" in said.error
    assert ask(source, "/rooms").status == 200


def test_importing_it_imports_no_prometheus_and_no_torch() -> None:
    code = "import sys, kvroom, kvroom.status.server; print({'prometheus_client', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_it_is_healthy_until_the_manager_is_closed(pair: Pair, source: str) -> None:
    assert ask(source, "/health")[::2] == (200, "ok")
    pair.prefill.close()
    said = ask(source, "/health")
    assert (said.status, said.error) == (503, "this manager is closed")
    assert ask(source, "/rooms").error == "this manager is closed"


def kvroom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvroom", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_shows_the_rooms_of_any_manager(pair: Pair, source: str, sink: str) -> None:
    with pair.prefill.sender(ROOM, identity=PROMPT):
        done = kvroom("rooms", f"http://{source}", f"http://{sink}")
        assert (done.returncode, done.stderr) == (0, "")
        (row,) = [line for line in done.stdout.splitlines() if "EXPECTED" in line]
        assert row.split()[:5] == [source, str(ROOM), "prefill", "side", "EXPECTED"]
        assert done.stdout.splitlines()[-1].rstrip() == "1 room open"
        one = kvroom("rooms", source, sink, "--room", str(ROOM))
        assert (one.returncode, one.stderr) == (0, "")
        assert one.stdout.startswith(f"room {ROOM} on http://{source}, prefill side: EXPECTED for ")
        as_json = msgspec.json.decode(kvroom("rooms", source, "--json").stdout)
        assert msgspec.convert(as_json["workers"][0]["answer"], OpenRooms).kept == 1
    none = kvroom("rooms", source, sink, "--room", str(ROOM))
    assert none.returncode == 1
    assert f"room {ROOM} is not open on http://{source}, http://{sink}" in none.stderr


def test_a_port_in_use_is_named_and_nothing_is_left(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = StatusServer(pair.prefill, port=port)
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is in use"):
            server.start()
        assert not [thread for thread in threading.enumerate() if thread.name == "kvroom-status"]
    with server:  # the port is free again
        assert ask(server.address, "/health").status == 200


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 65536, "port 65536 for showing rooms is not in"),
        ("0.0.0.0", 0, "admin address 0.0.0.0 is not loopback and needs a token: set KVROOM_ADMIN_TOKEN_FILE or KVR"),
        ("", 0, r"admin address \* is not loopback"),
    ],
)
def test_where_it_may_not_listen_is_said_at_once(pair: Pair, host: str, port: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        StatusServer(pair.prefill, host, port)


def test_beyond_loopback_it_answers_only_with_the_token(pair: Pair) -> None:
    with StatusServer(pair.prefill, "0.0.0.0", token=TOKEN) as server:
        where = server.address.replace("0.0.0.0", "127.0.0.1")
        for path in ("/rooms", "/metrics", "/health", "/nowhere"):
            assert ask(where, path).status == 401
        assert ask(where, "/rooms", Authorization=f"Bearer {TOKEN.decode()}").status == 200


def test_it_begins_and_ends_as_often_as_it_is_told(pair: Pair) -> None:
    server = StatusServer(pair.prefill)
    with pytest.raises(ConfigurationError, match="no address before it is started"):
        _ = server.address
    for _ in range(2):
        address = server.start()
        assert server.address == address
        assert ask(address, "/health").status == 200
        with pytest.raises(ConfigurationError, match=f"the status server is already running, on {address}"):
            server.start()
        server.close()
        server.close()
        with pytest.raises(ConnectionRefusedError):
            ask(address, "/health")
    assert pair.prefill.audit() == Audit()  # the manager still works


def test_it_ends_at_once_whoever_waits(pair: Pair) -> None:
    server = StatusServer(pair.prefill)
    address = server.start()
    with pair.prefill.sender(ROOM, identity=PROMPT):
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", "/rooms?idle_within_s=60")
        until(lambda: len(pair.prefill.driver._idle_waiters) > 0)
        before = time.monotonic()
        server.close()
        assert time.monotonic() - before < 10
        connection.close()


def until(come: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + 20
    while not come():
        assert time.monotonic() < end, "it has not come within 20 s"


def test_a_fault_that_nobody_foresaw_does_not_hang_who_starts_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda error: seen.append(error.exc_type))
    monkeypatch.setattr("kvroom.status.server.http_site", lambda *_, **__: 1 / 0)
    with pytest.raises(ConfigurationError, match=r"could not start on 127\.0\.0\.1:0"):
        StatusServer(pair.prefill).start()
    assert seen == [ZeroDivisionError]

"""`kvroom rooms` and `kvroom fence` against real workers, and against addresses without a worker."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console, RenderableType

from kvroom.cli.activity import Counts, EndedRoom, OpenRooms, Sample, activity, newest
from kvroom.cli.ports import free_port
from kvroom.cli.rooms_tables import details, ended_table, rooms_table, workers_table
from kvroom.runtime.views import RoomView
from serve.helpers import Process, begin_post, command, environment, look, post, run, running

LOOPBACK = "127.0.0.1"
ROOM = 77
SIZES = ("--page-tokens", "4", "--pages", "64", "--chunk-tokens", "32", "--bootstrap-s", "600")


class Waiting(NamedTuple):
    """A prefill worker with one open room, which no decode worker joins."""

    worker: Process

    @property
    def url(self) -> str:
        return self.worker.url


@pytest.fixture(scope="module")
def waiting(model_dir: Path) -> Iterator[Waiting]:
    with running("prefill", "--model", str(model_dir), *SIZES, KVROOM_SECRET="x" * 32) as worker:
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}, "bootstrap_host": LOOPBACK,
                "bootstrap_port": int(worker.ready.facts["bootstrap_port"]), "bootstrap_room": ROOM}  # fmt: skip
        with begin_post(worker.url, "/generate", body):
            assert look(worker.url, "/rooms?phase=EXPECTED&within_s=20").status == 200
            yield Waiting(worker)


@pytest.fixture(scope="module")
def closed() -> str:
    return f"http://{LOOPBACK}:{free_port(LOOPBACK)}"


def test_the_table_has_a_line_for_each_room(waiting: Waiting) -> None:
    done = run("rooms", waiting.url)
    assert (done.returncode, done.stderr) == (0, "")
    title, workers, worker, empty, head, row, foot = (line.rstrip() for line in done.stdout.splitlines())
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d, 1 worker, counts since each worker started", title
    )
    names = "worker open handed over failed aborted ended/s hand-off MB/s free pages quarantined"
    assert " ".join(workers.split()) == names
    name = f"prefill {waiting.url.removeprefix('http://')}"
    assert worker.startswith(f"{name} ")
    assert " ".join(worker.split()[2:]) == "1 0 0 0 - - - 62 of 64 0"
    assert empty == ""
    assert " ".join(head.split()) == "worker room side phase for waits for deadline in peers pages bytes"
    assert " ".join(row.split()).startswith(f"{name} {ROOM} prefill side EXPECTED ")
    assert "a decode worker to offer pages" in row
    assert foot == "1 room open"


def test_one_room_is_shown_with_its_timeline(waiting: Waiting) -> None:
    done = run("rooms", waiting.url.removeprefix("http://") + "/", "--room", str(ROOM))
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0].startswith(f"room {ROOM} on {waiting.url}, prefill side: EXPECTED for ")
    assert lines[1].startswith("  waits for a decode worker to offer pages, ")
    assert lines[-1].split()[0] == "EXPECTED"


def test_what_the_workers_said_is_there_as_json(waiting: Waiting, closed: str) -> None:
    done = run("rooms", waiting.url, closed, "--json")
    assert done.returncode == 3
    here, gone = json.loads(done.stdout)["workers"]
    assert (here["url"], here["error"], here["answer"]["kept"]) == (waiting.url, None, 1)
    assert here["answer"]["open"][0]["room"] == ROOM
    assert (gone["url"], gone["answer"]) == (closed, None)
    one = json.loads(run("rooms", waiting.url, "--room", str(ROOM), "--json").stdout)
    assert one["workers"][0]["answer"]["views"][0]["phase"] == "EXPECTED"


def test_a_worker_that_does_not_answer_is_one_line_and_the_others_are_shown(waiting: Waiting, closed: str) -> None:
    for more in ((), ("--room", str(ROOM))):
        done = run("rooms", closed, waiting.url, *more)
        assert done.returncode == 3
        assert str(ROOM) in done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"kvroom rooms: {closed}: no answer: ")


def test_a_room_that_is_not_open_is_said_to_be_so(waiting: Waiting) -> None:
    done = run("rooms", waiting.url, "--room", "78")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvroom rooms: room 78 is not open on {waiting.url}: ")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 2, "no worker is named: give a URL"),
        (("http://x", "--watch", "--json"), 2, "--watch cannot be combined with --json"),
        (("http://x", "--room", str(2**63)), 2, "is not a room number"),
        (("http://x:y",), 2, "'http://x:y' has a port that is not a number in [0, 65536), 'y': write a URL"),
        (("::1:8000",), 2, "'::1:8000' has an IPv6 address that needs brackets: write a URL"),
        (("--limit", "0", "http://x"), 2, "give a number of at least 1"),
    ],
)
def test_what_is_wrong_is_one_clear_line(arguments: tuple[str, ...], status: int, said: str) -> None:
    done = run("rooms", *arguments)
    assert done.returncode == status
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("more", [(), ("--room", "7")], ids=["table", "room"])
def test_a_server_that_is_no_worker_is_named(stranger: str, more: tuple[str, ...]) -> None:
    done = run("rooms", stranger, f"{stranger}/junk", *more)
    assert done.returncode == 3
    first, second = done.stderr.splitlines()
    assert first == f"kvroom rooms: {stranger}: answered 404: 'no such page'; is it a kvroom worker or its router?"
    assert second.startswith(f"kvroom rooms: {stranger}/junk: what it says about its rooms cannot be read (")


def test_the_table_lives_on_a_terminal_until_it_is_interrupted(waiting: Waiting) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        watching = subprocess.Popen(
            command("rooms", waiting.url, "--watch", "--every-s", "0.05"), stdout=theirs, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, env=environment(TERM="xterm", COLUMNS="200", LINES="30"),
        )  # fmt: skip
        os.close(theirs)
        with watching:
            seen = _read_until(screen, b"room open", times=3)
            watching.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO ends the terminal when its last writer is gone
                while screen.read(1 << 16):
                    pass
            assert watching.wait(20) == 0
            assert watching.stderr is not None
            assert watching.stderr.read() == b""
    assert str(ROOM).encode() in seen


def _read_until(screen: FileIO, mark: bytes, times: int) -> bytes:
    end, seen = time.monotonic() + 30, b""
    while seen.count(mark) < times:
        ready, _, _ = select.select([screen], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{mark!r} was not shown {times} times: {seen!r}"
        seen += screen.read(1 << 16)
    return seen


def view(room: int, age_s: float, **changes: object) -> RoomView:
    whole = {
        "room": room, "generation": 5, "side": "decode", "phase": "OFFERED", "status": "WaitingForInput",
        "peers": ("10.0.0.1:5",), "pages": 3, "nbytes": 0, "cleared": False,
        "waits_for": "the first bytes from 10.0.0.1:5", "waits_until_s": 9.0, "failure": None, "cause": None,
        "identity": {}, "peer_identity": {},
        "timeline": (("OPENED", age_s), ("OFFERED", age_s / 2)), **changes,
    }  # fmt: skip
    return RoomView(**whole)  # type: ignore[arg-type]


def written(shown: RenderableType) -> list[str]:
    console = Console(width=180, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get().splitlines()


def test_the_oldest_rooms_come_first_and_the_others_are_counted() -> None:
    views = [("http://a:1", view(1, 2.0)), ("http://b:1", view(2, 8.0)), ("http://a:1", view(3, 4.0))]
    lines = written(rooms_table(views, total=50, limit=2))
    assert [line.split()[1] for line in lines[1:3]] == ["2", "3"]
    assert "4.0 s" in lines[1]  # the time in its phase, not the 8 s since it was opened
    assert lines[3].rstrip() == "50 rooms open, the 2 oldest are shown"


def test_what_a_peer_said_cannot_reach_the_terminal_as_codes() -> None:
    bad = view(1, 2.0, failure="gone \x1b[2J\n[red]x[/red]", phase="RELEASED", waits_for=None, waits_until_s=None)
    text = "\n".join(written(details("http://a:1", bad)))
    assert "\x1b" not in text
    assert "gone ?[2J?[red]x[/red]" in text
    assert "waits for its engine to clear it" in text


def test_the_operators_word_is_refused_where_no_such_peer_was_lost(waiting: Waiting, closed: str) -> None:
    done = run("fence", "10.9.9.9", waiting.url, closed)
    assert (done.returncode, done.stdout) == (3, "")
    assert run("fence", "10.9.9.9", waiting.url).returncode == 1
    said = sorted(done.stderr.splitlines())
    assert f"kvroom fence: {waiting.url}: no lost peer at 10.9.9.9; lost peers: none" in said
    assert any(line.startswith(f"kvroom fence: {closed}: no answer: ") for line in said)
    for odd in ("a b", "10.0.0.1:x", ""):
        assert run("fence", odd, waiting.url).returncode == 2


def test_no_answer_is_not_an_empty_table(closed: str) -> None:
    done = run("rooms", closed)
    assert done.returncode == 3
    (line,) = done.stdout.splitlines()
    assert line.rstrip().endswith(", no worker answered")
    (line,) = done.stderr.splitlines()
    assert line == f"kvroom rooms: {closed}: no answer: connection refused; is the worker up?"
    assert run("rooms", closed, "--room", "7").returncode == 3


def test_bytes_that_are_no_http_are_no_missing_answer() -> None:
    with socketserver.TCPServer((LOOPBACK, 0), _NoHttp) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://{LOOPBACK}:{server.server_address[1]}"
            for arguments in (("rooms", url), ("fence", "10.9.9.9", url)):
                done = run(*arguments)
                assert done.returncode == 3
                (line,) = done.stderr.splitlines()
                assert line.startswith(f"kvroom {arguments[0]}: {url}: its answer is not valid HTTP (")
                assert line.endswith("; is it a kvroom worker or its router?")
        finally:
            server.shutdown()
            thread.join()


class _NoHttp(socketserver.StreamRequestHandler):
    """A server of another protocol, which reads a request and answers with its own words."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"-ERR unknown command\r\n\r\n")


def test_without_a_terminal_watch_prints_block_after_block(waiting: Waiting) -> None:
    with subprocess.Popen(
        command("rooms", waiting.url, "--watch", "--every-s", "0.05"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, env=environment(), text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        titles: list[str] = []
        for line in watching.stdout:
            titles += [line] if "counts " in line else []
            if len(titles) == 3:
                break
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=20)
    assert (watching.returncode, errors) == (0, "")
    assert len(titles) == 3
    assert "since each worker started" in titles[0]
    assert all(re.search(r"counts of the last \d+\.\d s", line) for line in titles[1:])


def answer(opened: int, ended: dict[str, int], pool: object = None) -> OpenRooms:
    succeeded = ended.get("", 0)
    counts = Counts(opened, ended, succeeded, 0.002 * succeeded, 1_000_000 * succeeded)
    return OpenRooms((), 0, counts, pool)


def test_the_counts_of_an_interval_are_those_since_the_last_answer() -> None:
    before = answer(10, {"": 5, "aborted": 1}).counts
    assert before is not None
    now = answer(100, {"": 45, "aborted": 3, "link_lost": 2}, {"pages": 64, "free": 50, "cached": 4})
    (_, row) = written(workers_table([activity("decode a:1", now, 12.0, Sample(10.0, before))]))
    assert " ".join(row.split()) == "decode a:1 0 40 2 2 22.0 2.00 ms 20.0 54 of 64 0"


@pytest.mark.parametrize(
    ("opened", "ended"), [(9, {"": 6, "aborted": 1}), (20, {"": 7, "aborted": 0})],
    ids=["fewer opened", "fewer of one cause"],
)  # fmt: skip
def test_a_worker_that_started_again_is_counted_from_its_start(opened: int, ended: dict[str, int]) -> None:
    before = answer(10, {"": 5, "aborted": 1}).counts
    assert before is not None
    now = answer(opened, ended)
    row = activity("decode a:1", now, 12.0, Sample(10.0, before))
    assert row.counts == now.counts


@pytest.mark.parametrize("pool", [None, 7, {"slots": 3}, {"pages": "many", "free": 1}])
def test_an_older_worker_and_a_pool_of_another_engine_are_shown_without_counts(pool: object) -> None:
    (_, row) = written(workers_table([activity("a:1", OpenRooms((), 3, None, pool), 12.0, None)]))
    assert " ".join(row.split()) == "a:1 3 - - - - - - - -"


def test_the_rooms_that_ended_last_come_first_and_a_failure_has_its_sentence() -> None:
    old = EndedRoom(room=1, handoff_s=0.0005, nbytes=64)  # of a worker that gives no time
    first = EndedRoom(room=2, ended_at=1_700_000_000.25, outcome="failed", error="timed out \x1b[2J after 60 s")
    last = EndedRoom(room=3, ended_at=1_700_000_001.5, handoff_s=0.001, nbytes=128)
    rows = newest([("decode a:1", [old]), ("prefill b:1", [first, last])], 10)
    assert [room.room for _, room in rows] == [3, 2, 1]
    assert newest([("decode a:1", [old] * 300)], 4) == [("decode a:1", old)] * 4
    lines = written(ended_table(rows))[2:]
    assert re.match(r"\d\d:\d\d:\d\d\.500  prefill b:1 +3 +1\.00 ms +128  handed over", lines[0])
    assert "failed: timed out ?[2J after 60 s" in lines[1]
    assert " ".join(lines[2].split()) == "- decode a:1 1 0.50 ms 64 handed over"


def test_under_load_the_screen_has_what_happened_since_the_last_refresh(model_dir: Path) -> None:
    """A hand-off takes less than a millisecond, so the table of open rooms is nearly always empty."""
    with running("up", "--port", "0", "--prefill", "2", "--model", str(model_dir), *SIZES) as up, load(up):
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as screen:
            watching = subprocess.Popen(
                command("rooms", up.url, "--watch", "--every-s", "0.5"), stdout=theirs, stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL, env=environment(TERM="xterm", COLUMNS="200", LINES="40"),
            )  # fmt: skip
            os.close(theirs)
            with watching:
                seen = _read_until(screen, b"counts of the last", times=4).decode(errors="replace")
                watching.send_signal(signal.SIGINT)
                with contextlib.suppress(OSError):  # EIO ends the terminal when its last writer is gone
                    while screen.read(1 << 16):
                        pass
                assert watching.wait(20) == 0
    counted = re.findall(r"(prefill|decode) 127\.0\.0\.1:(\d+) +\d+ +([1-9]\d*) +0 +0 +[1-9][\d.]* +[\d.]+ ms", seen)
    assert len({port for role, port, _ in counted if role == "prefill"}) == 2
    assert {role for role, _, _ in counted} == {"prefill", "decode"}
    assert re.search(r"(prefill|decode) 127\.0\.0\.1:\d+ +\d+ +[\d.]+ ms +[1-9]\d* +handed over", seen)


@contextlib.contextmanager
def load(up: Process) -> Iterator[None]:
    """Send one request after the other until the block ends."""
    ended = threading.Event()
    body = {"model": up.ready.facts["model"], "prompt": "Hello", "max_tokens": 2}
    statuses: set[int] = set()

    def send() -> None:
        while not ended.is_set():
            statuses.add(post(up.url, "/v1/completions", body).status)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert statuses == {200}

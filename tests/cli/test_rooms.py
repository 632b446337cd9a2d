"""`kvroom rooms` and `kvroom fence` against real workers, and against addresses without a worker."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console, RenderableType

from kvroom.cli.ports import free_port
from kvroom.cli.rooms import details, table
from kvroom.runtime.views import RoomView
from serve.helpers import Process, begin_post, command, environment, look, run, running

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
    head, row, foot = (line.rstrip() for line in done.stdout.splitlines())
    assert " ".join(head.split()) == "worker room side phase for waits for deadline in peers pages bytes"
    assert row.split()[:4] == [waiting.url.removeprefix("http://"), str(ROOM), "prefill", "EXPECTED"]
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
    assert done.returncode == 1
    here, gone = json.loads(done.stdout)["workers"]
    assert (here["url"], here["error"], here["answer"]["kept"]) == (waiting.url, None, 1)
    assert here["answer"]["open"][0]["room"] == ROOM
    assert (gone["url"], gone["answer"]) == (closed, None)
    one = json.loads(run("rooms", waiting.url, "--room", str(ROOM), "--json").stdout)
    assert one["workers"][0]["answer"]["views"][0]["phase"] == "EXPECTED"


def test_a_worker_that_does_not_answer_is_one_line_and_the_others_are_shown(waiting: Waiting, closed: str) -> None:
    for more in ((), ("--room", str(ROOM))):
        done = run("rooms", closed, waiting.url, *more)
        assert done.returncode == 1
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
    assert done.returncode == 1
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
    lines = written(table(views, total=50, limit=2))
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
    assert (done.returncode, done.stdout) == (1, "")
    said = sorted(done.stderr.splitlines())
    assert f"kvroom fence: {waiting.url}: no lost peer at 10.9.9.9; lost peers: none" in said
    assert any(line.startswith(f"kvroom fence: {closed}: no answer: ") for line in said)
    for odd in ("a b", "10.0.0.1:x", ""):
        assert run("fence", odd, waiting.url).returncode == 2

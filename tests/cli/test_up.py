"""`kvroom up` ends every process that it started, however it ends itself, and ends when one of them ends."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from kvroom.cli.exit_status import ExitStatus
from kvroom.cli.processes import Child, ChildEnded, Children
from serve.helpers import END_S, environment, get, look, post, run, running

ENGINE = ("--page-tokens", "4", "--pages", "64")


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=END_S)
    assert alive == []


@pytest.mark.sampled
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order(model_dir: Path, number: signal.Signals) -> None:
    with running("up", "--port", "0", "--model", str(model_dir), *ENGINE) as up:
        family = up.family()
        status, errors = up.end(number)
    assert len(family) == 4  # itself, two workers, the router
    assert status == 0
    assert "all processes have ended" in errors
    assert "Traceback" not in errors
    assert_gone(family)


def test_children_do_not_survive_a_killed_parent(model_dir: Path) -> None:
    with running("up", "--port", "0", "--model", str(model_dir), *ENGINE) as up:
        family = up.family()
        up.end(signal.SIGKILL)
    assert_gone(family)


@pytest.mark.sampled
@pytest.mark.parametrize("victim", ["decode", "smg"])
def test_a_child_that_dies_ends_the_whole_and_is_named(model_dir: Path, victim: str) -> None:
    with running("up", "--port", "0", "--model", str(model_dir), *ENGINE) as up:
        family = up.family()
        (child,) = [one for one in family[1:] if any(victim in word for word in one.cmdline())]
        child.kill()
        _, errors = up.popen.communicate(timeout=END_S)
    assert up.popen.returncode == ExitStatus.CHILD_ENDED
    name = "router" if victim == "smg" else "decode-0"
    (said,) = [line for line in errors.splitlines() if line.startswith("kvroom up: error: ")]
    assert said.startswith(f"kvroom up: error: {name} was killed by SIGKILL: the kernel's out-of-memory killer is a ")
    assert f"{name}.log)" in said
    assert_gone(family)


PROXIES = dict.fromkeys(
    ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9"
)
"""The environment of a machine behind a proxy, with an address at which no process listens."""


def test_two_prefill_and_two_decode_workers_whatever_proxies_there_are(model_dir: Path) -> None:
    sizes = ("--prefill", "2", "--decode", "2", *ENGINE)
    with running("up", "--port", "0", "--model", str(model_dir), *sizes, **PROXIES) as up:
        workers = get(up.url, "/workers").json()["workers"]
        assert sorted(one["worker_type"] for one in workers) == ["decode", "decode", "prefill", "prefill"]
        body = {"model": up.ready.facts["model"], "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        texts = {post(up.url, "/v1/completions", body).json()["choices"][0]["text"] for _ in range(4)}
        assert len(texts) == 1
        for worker in workers:
            assert look(worker["url"], "/rooms?idle_within_s=10").status == 200
        shown = run("rooms", up.url, "--json", **PROXIES)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert sorted(one["url"] for one in json.loads(shown.stdout)["workers"]) == sorted(
            one["url"] for one in workers
        )
        refused = run("doctor", "--between", up.url, up.url)
        assert f"--between {up.url} is a router: give the URL of one of its workers (http://" in refused.stderr


def test_what_was_started_is_a_table_and_each_output_is_in_a_file(model_dir: Path, tmp_path: Path) -> None:
    logs = tmp_path / "new" / "logs"
    with running("up", "--port", "0", "--model", str(model_dir), *ENGINE, "--log-dir", str(logs)) as up:
        pids = {str(one.pid) for one in up.family()[1:]}
        workers = {one["url"]: one for one in get(up.url, "/workers").json()["workers"]}
        _, errors = up.end()
    lines = errors.splitlines()
    assert lines[0].startswith("[up] waiting for prefill-0, decode-0 to import torch and load the model")
    begin = next(index for index, line in enumerate(lines) if line.startswith("name "))
    assert lines[begin].split() == ["name", "role", "URL", "bootstrap", "admin", "URL", "pid", "log", "file"]
    prefill, decode, router = (line.split() for line in lines[begin + 1 : begin + 4])
    assert [row[:2] for row in (prefill, decode, router)] == [
        ["prefill-0", "prefill"], ["decode-0", "decode"], ["router", "router"],
    ]  # fmt: skip
    assert prefill[3] == f"127.0.0.1:{workers[prefill[2]]['bootstrap_port']}"
    assert (decode[2] in workers, decode[3], router[2], router[3:5]) == (True, "-", up.url, ["-", "-"])
    assert {row[5] for row in (prefill, decode, router)} == pids
    for row in (prefill, decode, router):
        assert row[6] == str(logs / f"{row[0]}.log")
        assert Path(row[6]).stat().st_size > 0 or row[0] == "router"
    assert "READY prefill " in (logs / "prefill-0.log").read_text()
    assert str(logs) in lines[-1]


def test_a_wrong_model_is_the_users_mistake(tmp_path: Path) -> None:
    done = run("up", "--port", "0", "--model", str(tmp_path / "none"), "--log-dir", str(tmp_path / "logs"))
    assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
    last = done.stderr.splitlines()[-1]
    assert "-0 ended with status 2: " in last
    assert str(tmp_path / "none") in last
    assert str(tmp_path / "logs") in last


def test_a_log_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "prefill-0.log").mkdir(parents=True)
    for given in ("file", "file/below", "taken"):
        done = run("up", "--port", "0", "--log-dir", str(tmp_path / given))
        assert (done.returncode, done.stdout) == (ExitStatus.USAGE, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"kvroom up: error: --log-dir {tmp_path / given}: ")
        assert line.endswith("; give a directory that you can write")


PROGRAMS = {
    "bytes": "import sys; sys.stderr.buffer.write(b'bad \\xff bytes without a newline'); sys.exit(3)",
    "early": "import sys; print('kvroom decode: error: early', file=sys.stderr); [print(i) for i in range(20)]; 1/0",
    "killed": "import os, signal; print('last', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("bytes", "ended with status 3 (log: LOG); its last output:\n  bad \ufffd bytes without a newline"),
        ("early", "ended with status 1: ZeroDivisionError: division by zero (log: LOG)"),
        ("killed", "shows it (log: LOG); its last output:\n  last"),
    ],
)
def test_the_last_words_of_a_child_are_those_that_it_wrote(program: str, words: str, tmp_path: Path) -> None:
    shown: list[tuple[str, str]] = []

    async def wait() -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAMS[program], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        with (tmp_path / "child.log").open("ab", buffering=0) as log:
            child = Child("child", process, lambda *line: shown.append(line), log=log)
            await child.ended
        return child

    error = asyncio.run(wait()).end_error()
    log = tmp_path / "child.log"
    assert str(error).endswith(words.replace("LOG", str(log)))
    assert type(error) is ChildEnded
    assert len(log.read_bytes().splitlines()) == len(shown) > 0


def test_two_children_that_end_at_the_same_time_are_both_named() -> None:
    async def start() -> None:
        async with Children(lambda *_: None) as children:
            first = await children.start("first", ["doctor", "--unknown"], environment())
            second = await children.start("second", ["doctor", "--unknown"], environment())
            await asyncio.wait([first.ended, second.ended])
            await children.guard(asyncio.get_running_loop().create_future())

    with pytest.raises(ChildEnded) as caught:
        asyncio.run(start())
    first, second = str(caught.value).splitlines()
    assert first.startswith("first ended with status 2: ")
    assert second.startswith("second ended with status 2: ")
    assert caught.value.status == ExitStatus.USAGE

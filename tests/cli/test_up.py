"""`kvroom up` ends every process that it started, however it ends itself, and ends when one of them ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from serve.helpers import END_S, get, look, post, run, running

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
    assert up.popen.returncode == 2
    assert "ended with status -9" in errors
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

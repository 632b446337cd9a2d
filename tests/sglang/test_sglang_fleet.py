"""Two prefill and two decode servers, by hand and behind a router."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from answers import Judge
from asking import Prompt, both, generate
from clients import run, run_all
from servers import Fleet, new_fleet, running, smg
from stories import empty

from sampling import amount

pytestmark = pytest.mark.timeout(900)
TOKENS = 8
SHORT = 129


@pytest.fixture(scope="module")
def four(pair: Fleet, model: Path, logs: Path) -> Iterator[Fleet]:
    """Start a second server for each side of the pair."""
    more = new_fleet(model, logs, "second")
    with running(*more.servers):
        yield Fleet([*pair.prefills, *more.prefills], [*pair.decodes, *more.decodes])


def short(judge: Judge) -> list[Prompt]:
    return [prompt for prompt in judge.prompts if len(prompt) <= SHORT]


def succeeded(servers: Fleet) -> list[float]:
    """Return the number of successful rooms of each server."""
    return [server.counted("kvroom_rooms_ended_total", outcome="succeeded") for server in servers.servers]


def is_empty(servers: Fleet) -> None:
    for server in servers.servers:
        run(empty(server))


def test_each_prefill_server_serves_each_decode_server(four: Fleet, judge: Judge) -> None:
    before = succeeded(four)
    asked = [(prefill, decode) for prefill in four.prefills for decode in four.decodes]
    prompts = short(judge)[-len(asked) :]
    calls = [
        partial(both, prefill, decode, prompt, salt=f"four {at}", max_tokens=TOKENS)
        for at, (prefill, decode) in enumerate(asked)
        for prompt in prompts
    ]
    for prompt, (first, answer) in zip(prompts * len(asked), run_all(calls, len(asked)), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    is_empty(four)
    assert [now - then for now, then in zip(succeeded(four), before, strict=True)] == [8, 8, 8, 8]
    assert all(len(server.rooms()["peers"]) == 2 for server in four.servers)


def test_a_router_sends_requests_to_all_of_them(four: Fleet, judge: Judge, logs: Path) -> None:
    before = succeeded(four)
    prompts = short(judge)[:: amount(2, 1)]
    with smg(four, logs / "smg-four.log") as url:
        calls = [partial(generate, url, prompt, salt="router", max_tokens=TOKENS) for prompt in prompts]
        for prompt, answer in zip(prompts, run_all(calls, 4), strict=True):
            judge.check(prompt, answer)
    is_empty(four)
    served = [now - then for now, then in zip(succeeded(four), before, strict=True)]
    assert all(served), served
    assert sum(served) == 2 * len(prompts)

"""Two prefill and two decode servers, by hand and behind a router; and pairs over each transport that runs here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from answers import Judge
from asking import Prompt, both, generate
from clients import run, run_all
from servers import Fleet, Server, new_fleet, running, smg
from stories import empty

from sampling import amount

pytestmark = pytest.mark.timeout(900)
TOKENS = 8
SHORT = 129


@pytest.fixture(scope="module")
def four(pair: Fleet, model: Path, logs: Path) -> Iterator[Fleet]:
    """Start a second server of each side beside the pair."""
    more = new_fleet(model, logs, "second")
    with running(*more.servers):
        yield Fleet([*pair.prefills, *more.prefills], [*pair.decodes, *more.decodes])


@pytest.fixture(scope="module")
def carried(request: pytest.FixtureRequest, model: Path, logs: Path, judge: Judge) -> Iterator[Fleet]:
    """Start a pair with a transport of its own, when the single server of `judge` has ended."""
    fleet = new_fleet(model, logs, request.param, settings={"TRANSPORT": request.param})
    with running(*fleet.servers):
        yield fleet


def short(judge: Judge) -> list[Prompt]:
    return [prompt for prompt in judge.prompts if len(prompt) <= SHORT]


def carriers(server: Server) -> set[str]:
    """Return the first words of what its window says of its peers: the transports that reach them."""
    return {how.split()[0].strip(",:") for how in server.rooms()["peers"].values()}


def succeeded(servers: Fleet) -> list[float]:
    """Return of each server how many of its rooms have succeeded."""
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


def test_the_transport_is_the_one_that_was_asked_for(pair: Fleet, judge: Judge) -> None:
    prompt = short(judge)[-1]
    first, answer = run(both(pair.prefill, pair.decode, prompt, salt="carriers", max_tokens=TOKENS))
    assert first.right, first
    judge.check(prompt, answer)
    wanted = os.environ.get("PAIR_TRANSPORT", "auto")
    for server in pair.servers:
        assert carriers(server) == {"local" if wanted == "auto" else wanted}


@pytest.mark.parametrize("carried", ["local", "tcp", "nixl", "mooncake"], indirect=True)
@pytest.mark.sampled
def test_each_transport(carried: Fleet, judge: Judge) -> None:
    """All prompts, four at a time and more than once, so that transfers overlap."""
    prompts = judge.prompts[:: amount(2, 1)] * 2
    calls = [
        partial(both, carried.prefill, carried.decode, prompt, salt=f"carried {at}", max_tokens=TOKENS)
        for at, prompt in enumerate(prompts)
    ]
    for prompt, (first, answer) in zip(prompts, run_all(calls, 4), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    is_empty(carried)
    for server in carried.servers:
        assert carriers(server) == {server.settings["TRANSPORT"]}

"""Pairs over each transport that this machine supports, and one with IPv6 addresses behind a router.

They run one after the other: with the pair of all tests, that is four servers at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from answers import Judge
from asking import both, generate
from clients import run, run_all
from fleet import LOOPBACK
from servers import Fleet, Server, new_fleet, running, smg
from stories import empty

from sampling import amount

pytestmark = pytest.mark.timeout(900)
TOKENS = 8


@pytest.fixture(scope="module")
def carried(request: pytest.FixtureRequest, model: Path, logs: Path, judge: Judge) -> Iterator[Fleet]:
    """Start a pair over this transport, after the single server of `judge` has ended."""
    name, host = ("tcp", "::1") if request.param == "ipv6" else (request.param, LOOPBACK)
    fleet = new_fleet(
        model,
        logs,
        request.param,
        settings={"TRANSPORT": name, "TRUSTED_FABRIC": str(int(name == "mooncake"))},
        host=host,
    )
    with running(*fleet.servers):
        yield fleet


def carriers(server: Server) -> set[str]:
    """Return the transports that reach a server's peers: the first words about each in its status server."""
    return {how.split()[0].strip(",:") for how in server.rooms()["peers"].values()}


def test_the_transport_is_the_one_that_was_asked_for(pair: Fleet, judge: Judge) -> None:
    prompt = judge.prompts[0]
    first, answer = run(both(pair.prefill, pair.decode, prompt, salt="carriers", max_tokens=TOKENS))
    assert first.right, first
    judge.check(prompt, answer)
    wanted = os.environ.get("PAIR_TRANSPORT", "auto")
    for server in pair.servers:
        assert carriers(server) == {"local" if wanted == "auto" else wanted}


@pytest.mark.parametrize("carried", ["local", "tcp", "nixl", "mooncake", "ipv6"], indirect=True)
@pytest.mark.sampled
def test_each_transport(carried: Fleet, judge: Judge, logs: Path) -> None:
    """All prompts are sent, four at a time and more than once, so that transfers overlap."""
    prompts = judge.prompts[:: amount(2, 1)] * 2
    calls = [
        partial(both, carried.prefill, carried.decode, prompt, salt=f"carried {at}", max_tokens=TOKENS)
        for at, prompt in enumerate(prompts)
    ]
    for prompt, (first, answer) in zip(prompts, run_all(calls, 4), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    if carried.prefill.host != LOOPBACK:  # the router writes the address in brackets
        with smg(carried, logs / "smg-ipv6.log") as url:
            judge.check(prompts[0], run(generate(url, prompts[0], salt="router", max_tokens=TOKENS)))
    for server in carried.servers:
        run(empty(server))
        assert carriers(server) == {server.settings["TRANSPORT"]}

"""A slow and a broken network between two hosts: a relay in the middle delays, stalls and closes connections."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .managers import HALF, TOKENS, Managers, managers
from .network import Network
from .starting import Where, ended, environment

PORT = 7100
TO_PREFILL, TO_DECODE = "10.77.0.20", "10.77.0.21"
DELAY_S = 0.05
HEARTBEAT_S = 1.0
ROOMS = itertools.count(1)

Control = Callable[..., None]
Sides = tuple[Managers, Managers, str]


@pytest.fixture(scope="module")
def relay(network: Network, logs: Path) -> Iterator[Control]:
    """Run a relay on the host in the middle; yield a function that calls its methods by name."""
    hosts = {TO_PREFILL: network.prefill.address, TO_DECODE: network.decode.address}
    for address in hosts:
        network.middle.redirect(address, PORT)
    command = [sys.executable, "-m", "hosts.relay", str(PORT), json.dumps(hosts)]
    with ended(network.middle.start(command, environment(), log=logs / "relay")) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == '"listening"\n', (logs / "relay").read_text()
        yield lambda method, *arguments: _tell(popen, method, arguments)


def _tell(popen: subprocess.Popen[str], method: str, arguments: Any) -> None:
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.write(json.dumps([method, arguments]) + "\n")
    popen.stdin.flush()
    assert popen.stdout.readline()


@pytest.fixture(scope="module", params=["tcp", "mooncake"])
def sides(network: Network, relay: Control, logs: Path, request: pytest.FixtureRequest) -> Iterator[Sides]:
    """Managers that reach each other only through the relay. nixl's UCX tells its peers addresses of its own."""
    with contextlib.ExitStack() as stack:
        prefill = stack.enter_context(managers(network.prefill, logs / f"relay-{request.param}-prefill"))
        decode = stack.enter_context(managers(network.decode, logs / f"relay-{request.param}-decode"))
        options = {"transport": request.param, "heartbeat_s": HEARTBEAT_S}
        ours, theirs = Where(network.prefill.address, TO_PREFILL), Where(network.decode.address, TO_DECODE)
        directory = prefill.ask("open", "one", role="prefill", where=ours, **options)
        decode.ask("open", "one", role="decode", where=theirs, **options)
        yield prefill, decode, directory


@pytest.fixture(autouse=True)
def passing(relay: Control) -> Iterator[None]:
    """Let the relay pass everything on immediately again, also after a failed test."""
    yield
    relay("delay", 0)
    relay("resume")


def begin(sides: Sides, pages: list[int]) -> int:
    prefill, decode, directory = sides
    room = next(ROOMS)
    decode.ask("receive", "one", room, pages, directory)
    prefill.ask("send", "one", room, [3], HALF)
    assert decode.ask("receives", "one", room)
    return room


def finish(sides: Sides, room: int) -> None:
    """Send the other half; both sides succeed with the same bytes."""
    prefill, decode, _ = sides
    prefill.ask("send", "one", room, [5], TOKENS)
    (_, failure, sent), (_, error, received) = (side.ask("outcome", "one", room) for side in (prefill, decode))
    assert (failure, error) == ("", "")
    assert sent == received


def test_requests_are_handed_over_under_delay(relay: Control, sides: Sides) -> None:
    relay("delay", DELAY_S)
    begun_s = time.monotonic()
    finish(sides, begin(sides, [0, 1]))
    assert time.monotonic() - begun_s > 4 * DELAY_S, "the bytes did not pass through the relay"
    finish(sides, begin(sides, [2, 3]))


@pytest.mark.parametrize(
    ("fault", "words", "within_s"),
    [("stall", r"was silent for \d\.\d s", 2.5 * HEARTBEAT_S), ("drop", r"the link to|the transfer to", HEARTBEAT_S)],
)
def test_a_broken_network_is_a_lost_link_on_both_sides(
    relay: Control, sides: Sides, fault: str, words: str, within_s: float
) -> None:
    room = begin(sides, [4, 5] if fault == "stall" else [6, 7])
    broken_s = time.monotonic()
    relay(fault)
    for side in sides[:2]:
        at_s, failure, _ = side.ask("outcome", "one", room)
        assert at_s - broken_s < within_s
        assert re.search(words, failure), failure
    relay("resume")
    finish(sides, begin(sides, [8, 9]))

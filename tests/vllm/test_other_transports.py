"""Servers over transports that `auto` does not choose on one machine: right tokens, a kill, no leftovers.

A full run has a pair for each of them, and one with IPv6 addresses. A quick run uses the engines of both roles, over
the transport that was drawn.
"""

from __future__ import annotations

import asyncio

import pytest
from checks import assert_idle, assert_right, moved
from clients import run
from fixtures import Truth, other_transports
from fleet import Pair
from scenes import Scene, until
from sets import OTHER_TRANSPORTS, Garage

SERVERS = "both"
pytestmark = pytest.mark.timeout(1500)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.option.full
    names = (*OTHER_TRANSPORTS, "ipv6") if full else other_transports(metafunc.config)[:1]
    metafunc.parametrize("transport", names, scope="module")


@pytest.fixture(scope="module")
def scene(garage: Garage, truth: Truth, transport: str, request: pytest.FixtureRequest) -> Scene:
    servers = garage.take(f"over {transport}" if request.config.option.full else SERVERS)
    return Scene(Pair(*servers.values()), "fail", truth)


def test_in_turn(scene: Scene, truth: Truth, transport: str) -> None:
    asked = [*truth.short[:4], *truth.long[:2]]
    with moved(scene.pair, asked):
        assert_right([run(scene.in_turn(one)) for one in asked], asked, truth)
    (how,) = scene.decode.rooms()["peers"].values()
    assert how.startswith("tcp" if transport == "ipv6" else transport)


def test_both_at_once(scene: Scene, truth: Truth) -> None:
    asked = [*truth.short[4:6], truth.long[3]]
    with moved(scene.pair, asked):
        assert_right([run(scene.at_once(one)) for one in asked], asked, truth)


def test_a_decode_side_that_is_killed_leaves_nothing_behind(scene: Scene, truth: Truth) -> None:
    """The decode side is killed while its prompt is computed, and the prefill side serves the next one."""
    prompt, params = truth.long[6], scene.room()

    async def kill_when_open() -> None:
        legs = asyncio.gather(scene.pushed(prompt, params), scene.decoded(prompt, params))
        await until(lambda: bool(scene.prefill.rooms()["open"]), lambda: "no room was opened")
        await asyncio.to_thread(scene.decode.kill)
        await legs

    run(kill_when_open())
    scene.prefill.wait_for_usage(0)
    scene.pair.heal()
    assert_idle(scene.pair)
    assert run(scene.plain(scene.prefill, truth.short[0])).right
    answer = run(scene.in_turn(truth.short[7]))
    assert_right([answer], [truth.short[7]], truth)

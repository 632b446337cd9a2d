"""Two real engines with the role kv_both: each prefills for the other, also at the same time."""

from __future__ import annotations

import asyncio

import pytest
from checks import assert_idle, assert_right, moved
from clients import Answer, run
from fixtures import Truth
from fleet import Pair
from scenes import Scene
from sets import Garage

SERVERS = "both"
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def engines(garage: Garage) -> Pair:
    return Pair(*garage.take(SERVERS).values())


@pytest.fixture(params=["left to right", "right to left"])
def scene(engines: Pair, truth: Truth, request: pytest.FixtureRequest) -> Scene:
    pair = engines if request.param == "left to right" else Pair(*reversed(engines.servers))
    return Scene(pair, "fail", truth)


def test_in_turn(scene: Scene, truth: Truth) -> None:
    asked = [*truth.short[:2], truth.long[0]]
    with moved(scene.pair, asked):
        assert_right([run(scene.in_turn(prompt)) for prompt in asked], asked, truth)


def test_at_once(scene: Scene, truth: Truth) -> None:
    asked = [*truth.short[2:4], truth.long[1]]
    with moved(scene.pair, asked):
        assert_right([run(scene.at_once(prompt)) for prompt in asked], asked, truth)


def test_both_directions_at_the_same_time(engines: Pair, truth: Truth) -> None:
    """Two prompts in each direction: each engine prefills while it decodes prompts that the other has prefilled."""
    asked = [*truth.short[4:6], *truth.long[2:4]]
    ways = [Scene(pair, "fail", truth) for pair in (engines, Pair(*reversed(engines.servers)))]

    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(ways[n % 2].at_once(prompt) for n, prompt in enumerate(asked)))

    for prompt, answer in zip(asked, run(all_of_them()), strict=True):
        ways[0].right(answer, prompt)
        assert answer.params is None, answer
    assert_idle(engines)


def test_a_request_that_does_not_say_its_part_is_refused(scene: Scene, truth: Truth) -> None:
    """A room number is not enough, because this engine could be either side."""
    prompt, params = truth.short[6], scene.room()
    answer = run(scene.plain(scene.decode, prompt, params=params))
    scene.failed(answer, prompt, "add do_remote_decode (it prefills) or do_remote_prefill (it decodes)", None)
    assert_idle(scene.pair)

"""The same pair over other transports than what `auto` takes on one machine: right tokens, a kill, no leftovers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from checks import assert_idle, assert_right, moved
from clients import Answer, both_at_once, complete, in_turn, run
from fixtures import Truth, new_room
from fleet import Pair, kvroom_pair, running, wait_until

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", params=["tcp", "nixl"])
def pair(model: Path, logs: Path, truth: Truth, request: pytest.FixtureRequest) -> Iterator[Pair]:
    name = str(request.param)
    with running(
        kvroom_pair(model, logs, name=f"{name}-", transport=name, lease_s=10, drain_s=2, heartbeat_s=1)
    ) as pair:
        yield pair


def test_in_turn(pair: Pair, truth: Truth) -> None:
    asked = [*truth.short[:4], *truth.long[:2]]
    with moved(pair, asked):
        assert_right([run(in_turn(pair.prefill.url, pair.decode.url, one)) for one in asked], asked, truth)
    (how,) = pair.decode.rooms()["peers"].values()
    assert how.startswith(pair.decode.extra["transport"])


def test_both_at_once(pair: Pair, truth: Truth) -> None:
    asked = [*truth.short[4:6], truth.long[3]]

    async def ask(prompt: tuple[int, ...]) -> Answer:
        _, answer = await both_at_once(pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill))
        return answer

    with moved(pair, asked):
        assert_right([run(ask(one)) for one in asked], asked, truth)


def test_a_decode_side_that_is_killed_leaves_nothing_behind(pair: Pair, truth: Truth) -> None:
    """It is killed while its prompt is computed; the prefill side serves the next one."""
    prompt, room = truth.long[6], new_room(pair.prefill)

    async def kill_when_open() -> None:
        legs = asyncio.create_task(both_at_once(pair.prefill.url, pair.decode.url, prompt, room))
        await asyncio.to_thread(wait_until, lambda: pair.prefill.rooms()["open"], 60, lambda: "no room was opened")
        await asyncio.to_thread(pair.decode.kill)
        await legs

    run(kill_when_open())
    pair.prefill.wait_for_usage(0)
    pair.heal()
    assert_idle(pair)
    assert run(complete(pair.prefill.url, truth.short[0])).right
    answer = run(in_turn(pair.prefill.url, pair.decode.url, truth.short[7]))
    assert_right([answer], [truth.short[7]], truth)

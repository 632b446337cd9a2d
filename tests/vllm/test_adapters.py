"""Two legs of a room with different LoRA adapters: the room fails, and both adapters answer as before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from clients import Answer, complete, run
from fixtures import new_room
from fleet import Pair
from sets import ADAPTERS, Garage

from sampling import amount

SERVERS = "adapters"
pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not amount(quick=0, full=1), reason="a pair of its own: make test-vllm-full"),
]
BASE = "model"
PROMPT = [1000 + 7919 * i % 40000 for i in range(200)]


@pytest.fixture(scope="module")
def pair(garage: Garage) -> Pair:
    return Pair(**garage.take(SERVERS))


async def legs(pair: Pair, prefilled: str, decoded: str) -> tuple[int, Answer]:
    """Send both legs of one room, each for its model. Return the room and the decode side's answer."""
    room = new_room(pair.prefill)
    salt = f"{prefilled} {decoded}"

    def leg(url: str, model: str, **options: Any) -> Any:
        return complete(url, PROMPT, salt=salt, model=model, **options)

    first, answer = await asyncio.gather(
        leg(pair.prefill.url, prefilled, max_tokens=1, params={**room, "do_remote_decode": True}),
        leg(pair.decode.url, decoded, params={**room, "do_remote_prefill": True}),
    )
    assert first.right, first
    return room["bootstrap_room"], answer


@pytest.mark.parametrize(("prefilled", "decoded"), [ADAPTERS, (BASE, ADAPTERS[1]), (ADAPTERS[0], BASE)])
def test_legs_for_different_adapters(pair: Pair, prefilled: str, decoded: str) -> None:
    room, answer = run(legs(pair, prefilled, decoded))
    assert answer.status == 500, answer
    first, second = ("none" if one == BASE else "set" for one in (prefilled, decoded))
    second = f"another ({second})" if first == second else second
    detail = f"adapter is {first} on the prefill side and {second} on the decode side"
    assert pair.decode.running.lines(f"room {room}", detail), pair.decode.running.said()
    for one in pair.servers:
        one.wait_for_usage()
        assert one.rooms()["open"] == []


def test_each_adapter_is_answered_as_without_a_pair(pair: Pair) -> None:
    """No block of another adapter was kept under its name, even after the legs that differed."""
    answers: list[list[int]] = []
    for name in (BASE, *ADAPTERS):
        expected = run(complete(pair.prefill.url, PROMPT, salt="alone", model=name))
        _, answer = run(legs(pair, name, name))
        assert (answer.detail, answer.tokens) == ("", expected.tokens)
        answers.append(answer.tokens)
    assert len({tuple(tokens) for tokens in answers}) == 3, answers

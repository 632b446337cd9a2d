"""A real pair: every answer is the reference, token for token, and the decode side computes no prompt itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from checks import BLOCK_TOKENS, assert_idle, assert_right, moved
from clients import Answer, both_at_once, complete, in_turn, run, run_all
from fixtures import SHARED, Truth, new_room
from fleet import Pair, router
from prompts import Prompt
from sets import Garage

SERVERS = "pair"
pytestmark = pytest.mark.timeout(1500)
IDLE_CORES = 0.1
IDLE_S = 5
IDLE_SPANS = 3


@pytest.fixture(scope="module")
def pair(garage: Garage) -> Pair:
    """Return a prefill server with a larger pool and a decode server."""
    return Pair(**garage.take(SERVERS))


@pytest.fixture(scope="module")
def front(pair: Pair, logs: Path) -> Iterator[str]:
    """Yield the URL of vllm-router in front of the pair."""
    with router([pair.prefill], [pair.decode], logs / "router.log") as url:
        yield url


def test_the_sides_have_different_pools(pair: Pair) -> None:
    blocks = [server.samples("vllm:cache_config_info")[0][1]["num_gpu_blocks"] for server in pair.servers]
    assert int(blocks[0]) > int(blocks[1]) > 0


@pytest.mark.parametrize("kind", ["short", "long"])
def test_through_the_router(pair: Pair, front: str, truth: Truth, kind: str) -> None:
    asked = truth.asked[kind]
    with moved(pair, asked):
        assert_right([run(complete(front, prompt, salt="router")) for prompt in asked], asked, truth)


@pytest.mark.parametrize("kind", ["short", "long"])
def test_both_legs_at_once(pair: Pair, truth: Truth, kind: str) -> None:
    """Of a third of the requests both legs are sent together; of the others, one leg is half a second earlier."""
    asked = truth.asked[kind]
    answers = []
    with moved(pair, asked):
        for number, prompt in enumerate(asked):
            legs = both_at_once(
                pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill), salt="at once",
                prefill_after_s=0.5 * (number % 3 == 1), decode_after_s=0.5 * (number % 3 == 2),
            )  # fmt: skip
            first, answer = run(legs)
            assert first.right, first
            answers.append(answer)
        assert_right(answers, asked, truth)


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["router", "at once"])
def test_eight_streams_at_the_same_time(pair: Pair, front: str, truth: Truth, way: str) -> None:
    asked = [*truth.short[:4], *truth.long[:4]]

    async def at_once(prompt: Prompt) -> Answer:
        _, answer = await both_at_once(
            pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill), salt="eight at once", stream=True
        )  # fmt: skip
        return answer

    ways = {"router": lambda prompt: complete(front, prompt, salt="eight", stream=True), "at once": at_once}
    with moved(pair, asked):
        answers = run_all([partial(ways[way], prompt) for prompt in asked], at_once=8)
    assert_right(answers, asked, truth)


def test_of_a_cached_prefix_only_the_rest_moves(pair: Pair, truth: Truth) -> None:
    first, sequel = truth.long[0], truth.sequel
    cached = SHARED // BLOCK_TOKENS * BLOCK_TOKENS
    ask = partial(in_turn, pair.prefill.url, pair.decode.url, salt="prefix")
    with moved(pair, [first]):
        assert_right([run(ask(first))], [first], truth)
    with moved(pair, [sequel], cached=cached):
        assert_right([run(ask(sequel))], [sequel], truth)


def test_an_idle_pair_uses_no_core(pair: Pair) -> None:
    """Several spans are measured, and one of them must be idle, because the machine may be busy in the others."""
    assert_idle(pair)
    spans: list[list[float]] = []
    while not spans or max(spans[-1]) >= IDLE_CORES:
        assert len(spans) < IDLE_SPANS, f"cores used while idle: {spans}"
        spans.append(cores_used(pair))


def cores_used(pair: Pair) -> list[float]:
    """Return the CPU seconds per second of each server during a time without requests."""
    began = [server.cpu_s() for server in pair.servers]
    time.sleep(IDLE_S)  # the measurement is of a time in which nothing happens
    return [(server.cpu_s() - before) / IDLE_S for server, before in zip(pair.servers, began, strict=True)]

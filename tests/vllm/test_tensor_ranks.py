"""Engines that split a model differently: two tensor-parallel ranks on one side and one on the other.

In a quick run, two engines of both roles hand over in both directions. A full run also has a pair for each direction.
"""

from __future__ import annotations

import asyncio

import pytest
from clients import Answer, complete, in_turn, run
from fixtures import new_room
from fleet import Pair
from sets import Garage

SERVERS = "tensor"
NAMES = {1: "one", 2: "two"}
LENGTHS = (20, 200, 700)
pytestmark = pytest.mark.timeout(1500)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    roles = ["both", "one each"] if metafunc.config.option.full else ["both"]
    metafunc.parametrize("roles", roles)


async def at_once(pair: Pair, prompt: list[int], salt: str) -> Answer:
    room = new_room(pair.prefill)
    _, answer = await asyncio.gather(
        complete(pair.prefill.url, prompt, max_tokens=1, params={**room, "do_remote_decode": True}, salt=salt),
        complete(pair.decode.url, prompt, params={**room, "do_remote_prefill": True}, salt=salt),
    )
    return answer


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2)])
def test_tensor_parallel_ranks_hand_over_their_heads(garage: Garage, roles: str, prefill: int, decode: int) -> None:
    if roles == "both":
        servers = garage.take(SERVERS)
        pair = Pair(servers[NAMES[prefill]], servers[NAMES[decode]])
    else:
        pair = Pair(**garage.take(f"tensor {prefill} to {decode}"))
    salt = f"{prefill} to {decode}"
    before = counted(pair)
    for length in LENGTHS:
        prompt = [1000 + (7919 * i + length) % 40000 for i in range(length)]
        expected = run(complete(pair.prefill.url, prompt, salt=salt))
        answer = run(in_turn(pair.prefill.url, pair.decode.url, prompt, salt=salt))
        assert (answer.detail, answer.tokens) == ("", expected.tokens)
        prompt = [token + 1 for token in prompt]
        expected = run(complete(pair.prefill.url, prompt, salt=salt))
        answer = run(at_once(pair, prompt, salt))
        assert (answer.detail, answer.tokens) == ("", expected.tokens)
    loaded, computed = (now - then for now, then in zip(counted(pair), before, strict=True))
    assert (loaded, computed) == (2 * sum(LENGTHS), 0)
    for one in pair.servers:
        one.wait_for_usage()


def counted(pair: Pair) -> tuple[float, float]:
    """Return the numbers of prompt tokens that the decode side has loaded and computed so far."""
    computed = pair.decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute")
    return pair.decode.metric("vllm:kvroom_tokens_loaded_total"), computed

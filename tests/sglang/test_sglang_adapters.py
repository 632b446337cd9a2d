"""Two legs of a room with different LoRA adapters: both fail, and each adapter answers as on a single server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
from asking import both, generate, new_room
from clients import run
from servers import Fleet, Server, new_fleet, running
from stories import empty

from sampling import amount

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not amount(quick=0, full=1), reason="three servers of its own: make test-sglang-full"),
]
ADAPTERS = ("formal", "brief")
PROMPT = [1000 + 7919 * i % 40000 for i in range(100)]


@dataclass(frozen=True)
class Adapted:
    """A pair with two adapters, and a single server with the same adapters."""

    pair: Fleet
    single: Server


@pytest.fixture(scope="module")
def adapted(model: Path, logs: Path) -> Iterator[Adapted]:
    base = models.two_heads(model, logs / "two-heads")
    paths = [f"{name}={models.adapter(base, logs / name, seed)}" for seed, name in enumerate(ADAPTERS)]
    lora = ("--lora-paths", *paths, "--max-loras-per-batch", "3", "--lora-backend", "torch_native")
    env = {"PYTHONPATH": str(Path(__file__).parent / "unpinned")}  # SGLang pins memory for adapters, even on the CPU
    given = ("--context-length", "2048", *lora)
    single = Server("adapters-single", base, logs / "adapters-single.log", arguments=given, env=env)
    pair = new_fleet(base, logs, "adapters", arguments=given, env=env)
    with running(single, *pair.servers):
        yield Adapted(pair, single)


@pytest.mark.parametrize(("prefilled", "decoded"), [ADAPTERS, (None, ADAPTERS[1]), (ADAPTERS[0], None)])
def test_legs_for_different_adapters(adapted: Adapted, prefilled: str | None, decoded: str | None) -> None:
    pair, room = adapted.pair, new_room(adapted.pair.prefill)

    async def ask() -> str:
        first = generate(pair.prefill.url, PROMPT, room=room, lora_path=prefilled)
        _, answer = await asyncio.gather(first, generate(pair.decode.url, PROMPT, room=room, lora_path=decoded))
        assert answer.status == 500, answer
        return answer.detail

    detail = run(ask())
    assert f"room {room['bootstrap_room']}" in detail
    first, second = ("none" if name is None else "set" for name in (prefilled, decoded))
    second = f"another ({second})" if first == second else second
    assert f"adapter is {first} on the prefill side and {second} on the decode side" in detail
    for server in pair.servers:
        run(empty(server))


def test_each_adapter_is_answered_as_by_a_single_server(adapted: Adapted) -> None:
    """No block of another adapter was kept under its name, even after the legs that differed."""
    answers: list[list[int]] = []
    for name in (None, *ADAPTERS):
        expected = run(generate(adapted.single.url, PROMPT, lora_path=name))
        first, answer = run(both(adapted.pair.prefill, adapted.pair.decode, PROMPT, lora_path=name))
        assert first.right, first
        assert (answer.detail, answer.tokens) == ("", expected.tokens)
        answers.append(answer.tokens)
    assert len({tuple(tokens) for tokens in answers}) == 3, answers

"""A real model through real workers and a real router: every token equals `transformers.generate`, nothing is left.

The model runs in float32 and greedily, so that the order within a batch cannot change an argmax. A quick run draws a
few of the prompts, including the shortest and the longest, and two of the transports, one with streams.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest

import sampling
from kvroom.cli.cluster import Cluster, cluster
from kvroom.cli.demo import Reference
from kvroom.cli.parser import parse
from kvroom.engine.weights import find
from kvroom.transports import probe

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 129, 200, 256, 300, 400, 511, 512, 700, 1000, 1500)
STREAM_LENGTHS = tuple(range(20, 20 + 32 * 6, 6))
NEW_TOKENS = 8
SENTENCES = (
    "The lighthouse keeper counts {n} ships before the fog comes in. ",
    "In the year {n} a clockmaker built a bridge of brass and patience. ",
    "A recipe for {n} people begins with onions, salt and a slow fire. ",
)
TRUSTED = {"mooncake": ("--trusted-fabric",)}  # its engine listens on every interface
OPTIONS = ("--dtype", "float32", "--pages", "1024")


class Expected:
    """Prompts of exact lengths, and the tokens that one process alone generates for them."""

    def __init__(self) -> None:
        directory = find("packaged")
        self.reference = Reference(directory, dtype="float32", device="cpu")
        text = "".join(sentence.format(n=n) for n in range(200) for sentence in SENTENCES)
        self._ids = self.reference._tokenizer.encode(text, add_special_tokens=False)
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def prompt(self, length: int, begin: int) -> tuple[int, ...]:
        """Return `length` tokens of running text; prompts with different `begin` share no prefix."""
        return tuple(self._ids[begin : begin + length])

    def answer(self, prompt: tuple[int, ...]) -> list[int]:
        if prompt not in self._answers:
            self._answers[prompt] = self.reference.greedy(prompt, NEW_TOKENS)
        return self._answers[prompt]


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


async def generate(session: aiohttp.ClientSession, url: str, prompt: Sequence[int], *, stream: bool) -> dict[str, Any]:
    """Return the last body of one /generate call."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
        "stream": stream,
    }
    async with session.post(f"{url}/generate", json=body) as response:
        assert response.status == 200, await response.text()
        if not stream:
            whole: dict[str, Any] = await response.json()
            return whole
        last: dict[str, Any] = {}
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
        return last


async def ask_all(here: Cluster, prompts: Sequence[Sequence[int]], *, at_once: int, stream: bool) -> list[Any]:
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: Sequence[int]) -> dict[str, Any]:
        async with gate:
            return await generate(session, here.url, prompt, stream=stream)

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = await asyncio.gather(*map(one, prompts))
        for name, url in here.admin_urls.items():
            async with session.get(f"{url}/rooms", params={"idle_within_s": 20}) as response:
                assert response.status == 200, f"left open on {name}: {await response.text()}"
    return list(answers)


@pytest.mark.sampled("streamed")
@pytest.mark.parametrize(
    ("workers", "transport", "streamed"),
    [(1, "auto", True), (2, "tcp", True), (1, "nixl", False), (1, "mooncake", False)],
    ids=["1x1-auto", "2x2-tcp", "1x1-nixl", "1x1-mooncake"],
)
def test_every_token_equals_generate(
    expected: Expected, workers: int, transport: str, streamed: bool, pytestconfig: pytest.Config
) -> None:
    if lacking := [missing.what for missing in probe(transport).missing]:
        pytest.skip(f"{transport} cannot run here: {lacking[0]}")
    draw = sampling.generator(pytestconfig, "prompts")  # the same for every transport: computed once
    lengths = {1, 1500, *draw.sample(LENGTHS, sampling.amount(4, full=len(LENGTHS)))}
    streams = draw.sample(STREAM_LENGTHS, sampling.amount(6, full=len(STREAM_LENGTHS))) if streamed else []
    mixed = [expected.prompt(length, 7 * LENGTHS.index(length)) for length in sorted(lengths)]
    short = [expected.prompt(length, 11 * STREAM_LENGTHS.index(length)) for length in sorted(streams)]

    async def run() -> list[Any]:
        options = parse(["up", *OPTIONS, "--transport", transport, *TRUSTED.get(transport, ())]).options
        async with cluster(options, prefills=workers, decodes=workers, port=0, output=lambda *_: None) as here:
            first = await here.children.guard(ask_all(here, mixed, at_once=4, stream=False))
            return first + await here.children.guard(ask_all(here, short, at_once=32, stream=True))

    answers = asyncio.run(run())
    for prompt, answer in zip(mixed + short, answers, strict=True):
        assert answer["output_ids"] == expected.answer(prompt), f"prompt of {len(prompt)} tokens"
        (cost,) = answer["kvroom"]
        assert cost["prompt_tokens_computed"] == 0
        assert cost["transport"].startswith("local" if transport == "auto" else transport)
        assert cost["nbytes"] > 0

"""Clients that disconnect at random moments, and more clients than the pools have room for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .clients import LONG, NEW_TOKENS, SHORT, Load, Prompt, Truth, asking
from .conftest import DEADLINES, Scene
from .fleet import Fleet, Worker

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

DEADLINE_S = 150.0
MOMENTS = (None, "OFFERED", "RECEIVING")
"""Phases of a room of the decode worker, before the first token. None: immediately, whatever state the request is in.

A room is OPENED too briefly for a test to wait for it: if the link is up, its pages are offered in the same step.
"""


def read_events(scene: Scene, prompt: Prompt, count: int) -> list[int]:
    """Read the first `count` events of a stream and disconnect; return the tokens so far."""
    tokens: list[int] = []
    with asking(scene.fleet.url, prompt, deadline_s=DEADLINE_S) as connection:
        lines = iter(connection.getresponse())
        while len(tokens) < count:
            tokens = tokens_of(next(lines)) or tokens
    return tokens


def tokens_of(line: bytes) -> list[int]:
    if not line.startswith(b"data: {"):
        return []
    tokens: list[int] = json.loads(line[6:])["output_ids"]
    return tokens


def leave_before_the_first_token(scene: Scene, prompt: Prompt, moment: str | None) -> None:
    """Disconnect when a room is in this phase: the client's own, or that of another client with a request in flight."""
    with asking(scene.fleet.url, prompt, deadline_s=DEADLINE_S):
        if moment is not None:
            scene.fleet.decodes[0].wait_for(moment)


def computed(scene: Scene) -> int:
    """Return the prompt tokens that the prefill workers have computed since their start, or found in their caches."""
    counts = [worker.rooms() for worker in scene.fleet.prefills]
    return sum(one["prompt_tokens_computed"] + one["prompt_tokens_cached"] for one in counts)


def test_clients_that_leave_hurt_nobody_else(scene: Scene) -> None:
    chance = random.Random(7)
    before = computed(scene)
    impatient = [scene.long[0], scene.long[1], scene.short[4]]
    load = Load(scene.truth, scene.fleet.url, DEADLINE_S)
    with ThreadPoolExecutor(16) as leaving:
        load.ask(scene.short[:4])
        early = [
            leaving.submit(leave_before_the_first_token, scene, prompt, moment)
            for prompt, moment in zip(impatient, MOMENTS, strict=True)
        ]
        counts = [chance.randrange(1, NEW_TOKENS) for _ in scene.short[4:]]
        midway = [
            leaving.submit(read_events, scene, prompt, count)
            for prompt, count in zip(scene.short[4:], counts, strict=True)
        ]
        for gone in early:
            gone.result()
        for prompt, one in zip(scene.short[4:], midway, strict=True):
            tokens = one.result()
            assert tokens == scene.truth.answer(prompt)[: len(tokens)]
    assert load.finish().check().causes == {}
    scene.fleet.assert_whole()
    asked = [*scene.short[:4], *impatient, *scene.short[4:]]
    assert computed(scene) - before < sum(map(len, asked)), "who left was computed to the end all the same"


@pytest.fixture
def small(truth: Truth, tmp_path: Path) -> Iterator[Fleet]:
    """One pair of workers with a pool for a long prompt and a few short ones, and with short queues."""
    sizes = (
        "--dtype",
        "float32",
        "--checksum",
        "--pages",
        "80",
        "--chunk-tokens",
        "64",
        "--max-running",
        "4",
        "--max-waiting",
        "2",
    )
    arguments = (*sizes, *DEADLINES)
    workers = [Worker(role, arguments, tmp_path / role) for role in ("prefill", "decode")]
    with Fleet(workers[:1], workers[1:]) as fleet:
        yield fleet


def test_more_requests_than_the_pool_and_the_queue_hold(small: Fleet, truth: Truth) -> None:
    long = [truth.shuffled(LONG, seed) for seed in range(3)]
    short = [truth.shuffled(SHORT, seed) for seed in range(100, 108)]
    load = Load(truth, small.url, DEADLINE_S)
    load.ask(long)
    load.ask(short * 2)
    tally = load.finish().check()
    print(tally)
    assert tally.verdicts["right"] > 0
    assert any("limit 6): retry later" in detail for detail in tally.words), tally
    small.assert_whole()
    again = Load(truth, small.url, DEADLINE_S)
    again.ask(short[:2])
    assert again.finish().check().causes == {}

"""Many requests at the same time on a real pair: SGLang runs eight, and the others wait in its queues."""

from __future__ import annotations

from functools import partial

import pytest
from answers import Judge
from asking import both
from clients import run, run_all
from servers import Fleet
from stories import empty

pytestmark = pytest.mark.timeout(900)
LONGEST = 129
TOKENS = 8


@pytest.mark.sampled
@pytest.mark.parametrize("count", [12, 32])
def test_all_are_answered_and_nothing_is_left(pair: Fleet, judge: Judge, count: int) -> None:
    short = [prompt for prompt in judge.prompts if len(prompt) <= LONGEST]
    asked = [short[at % len(short)] for at in range(count)]
    calls = [
        partial(both, pair.prefill, pair.decode, prompt, salt=f"{at} of {count}", stream=at % 2 == 0, max_tokens=TOKENS)
        for at, prompt in enumerate(asked)
    ]
    for prompt, (first, answer) in zip(asked, run_all(calls, count), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    for server in pair.servers:
        run(empty(server))

"""A real pair in float32: every answer is the single server's, token for token, whichever leg is first."""

from __future__ import annotations

from functools import partial

import pytest
from answers import Judge
from asking import both
from clients import run, run_all
from servers import Fleet

pytestmark = pytest.mark.timeout(900)
TOKENS = 8


def test_both_legs_at_once(pair: Fleet, judge: Judge) -> None:
    """Of a third of the requests both legs are sent together; of the others, one leg is half a second earlier."""
    for number, prompt in enumerate(judge.prompts):
        legs = both(
            pair.prefill, pair.decode, prompt, salt="one", max_tokens=TOKENS,
            prefill_after_s=0.5 * (number % 3 == 1), decode_after_s=0.5 * (number % 3 == 2),
        )  # fmt: skip
        first, answer = run(legs)
        assert first.right, first
        judge.check(prompt, answer)


def test_eight_streams_at_the_same_time(pair: Fleet, judge: Judge) -> None:
    ask = partial(both, pair.prefill, pair.decode, stream=True, salt="eight")
    for prompt, (_, answer) in zip(
        judge.prompts, run_all([partial(ask, one) for one in judge.prompts], 8), strict=True
    ):
        judge.check(prompt, answer)

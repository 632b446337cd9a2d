"""A real pair in bfloat16, with other sizes of chunks and pages: its answers differ only at near ties.

Only a full run has these three servers, because without AVX-512 each step takes much longer than in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from answers import CLOSE, Judge, made, reference
from asking import both
from clients import run_all
from servers import Fleet, Server, end, new_fleet, running

from sampling import amount

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not amount(quick=0, full=1), reason="three servers of its own: make test-sglang-full"),
]
ARGUMENTS = ("--page-size", "16", "--chunked-prefill-size", "512")


@pytest.fixture(scope="module")
def half(model: Path, logs: Path) -> Iterator[tuple[Fleet, Judge]]:
    """Start a single server and a pair in bfloat16. The judge lets an answer differ where two candidates are close."""
    single = Server("single-bfloat16", model, logs / "single-bfloat16.log", dtype="bfloat16", arguments=ARGUMENTS)
    pair = new_fleet(model, logs, "bfloat16", dtype="bfloat16", arguments=ARGUMENTS)
    with running(single, *pair.servers):
        judge = reference(single, made(model), CLOSE, at_once=1)
        end([single])
        yield pair, judge


@pytest.mark.parametrize("at_once", [1, 8])
def test_answers_part_at_near_ties_only(half: tuple[Fleet, Judge], at_once: int) -> None:
    pair, judge = half
    before = len(judge.near)
    ask = partial(both, pair.prefill, pair.decode, salt=f"bfloat16 {at_once}")
    answers = run_all([partial(ask, prompt) for prompt in judge.prompts], at_once)
    for prompt, (_, answer) in zip(judge.prompts, answers, strict=True):
        judge.check(prompt, answer)
    print(f"{len(judge.near) - before} of {len(answers)} answers part from the single server's at a near tie")
    assert len(judge.near) - before < len(answers) / 2, "too few tokens can be compared"

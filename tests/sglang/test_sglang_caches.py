"""Prefix caches on one or both sides, two page sizes, and chunks: a prompt that is sent again moves fewer bytes.

Each prompt has its own salt, so that no server has a part of it in its cache when it is first sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from answers import Judge
from asking import Answer, Prompt, both
from clients import run, run_all
from servers import Fleet, new_fleet, running
from stories import empty

from sampling import amount, generator

pytestmark = pytest.mark.timeout(900)
CHUNK = "128"
LONGEST = 511
TOKENS = 8
PAGES = [(16, 4), (1, 16), (16, 16)]
"""The page sizes of the prefill server and the decode server."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Use one drawn pair of page sizes for all tests, or, in a full run, every pair."""
    if "sizes" in metafunc.fixturenames:
        drawn = generator(metafunc.config, "page sizes").sample(PAGES, amount(1, len(PAGES)))
        metafunc.parametrize("sizes", drawn, ids="prefill{0[0]}-decode{0[1]}".format, scope="module")


@pytest.fixture(scope="module")
def token_bytes(model: Path) -> int:
    """Return the bytes of one token's keys and values in float32."""
    config = json.loads((model / "config.json").read_text())
    return 2 * 4 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * int(config["head_dim"])


@pytest.fixture(scope="module")
def cached(sizes: tuple[int, int], model: Path, logs: Path, judge: Judge) -> Iterator[Fleet]:
    """Start a pair with a prefix cache on both sides, after the single server of `judge` has ended."""
    fleet = new_fleet(model, logs, "pages-{}-{}".format(*sizes))
    fleet.prefill.arguments = ("--page-size", str(sizes[0]), "--chunked-prefill-size", CHUNK)
    fleet.decode.arguments = ("--page-size", str(sizes[1]), "--disaggregation-decode-enable-radix-cache")
    with running(*fleet.servers):
        yield fleet


def some(judge: Judge) -> list[Prompt]:
    """Return the prompts to send: all with up to `LONGEST` tokens, or every third of these."""
    return [prompt for prompt in judge.prompts if len(prompt) <= LONGEST][:: amount(3, 1)]


def ask(fleet: Fleet, prompt: Prompt, salt: str) -> tuple[Answer, int]:
    """Send both legs and wait until both servers are idle. Return the answer and the bytes that were handed over."""
    before = fleet.decode.counted("kvroom_handoff_bytes_total")
    first, answer = run(both(fleet.prefill, fleet.decode, prompt, salt=salt, max_tokens=TOKENS))
    assert first.right, first
    for server in fleet.servers:
        run(empty(server))
    return answer, int(fleet.decode.counted("kvroom_handoff_bytes_total") - before)


def whole_pages(tokens: int, page: int) -> int:
    return tokens - tokens % page


def test_a_prefix_on_the_prefill_side_is_not_computed_again_but_handed_over(
    pair: Fleet, judge: Judge, token_bytes: int
) -> None:
    for prompt in some(judge):
        for known in (0, len(prompt) - 1):  # the last token is computed each time
            answer, moved = ask(pair, prompt, f"prefill side {len(prompt)}")
            judge.check(prompt, answer)
            assert answer.cached_tokens == known
            assert moved == len(prompt) * token_bytes


def test_a_prefix_on_the_decode_side_is_not_handed_over(
    cached: Fleet, sizes: tuple[int, int], judge: Judge, token_bytes: int
) -> None:
    for prompt in some(judge):
        for known in (0, len(prompt)):
            answer, moved = ask(cached, prompt, f"both sides {len(prompt)}")
            judge.check(prompt, answer)
            computed, here = whole_pages(max(known - 1, 0), sizes[0]), whole_pages(known, sizes[1])
            assert answer.cached_tokens == max(computed, here), "SGLang tells what the side that has more of it has"
            assert moved == (len(prompt) - here) * token_bytes


def test_of_a_prompt_that_grows_only_the_new_tokens_are_handed_over(
    cached: Fleet, sizes: tuple[int, int], judge: Judge, token_bytes: int
) -> None:
    prompt = next(prompt for prompt in judge.prompts if len(prompt) == LONGEST)
    known = 0
    for length in (100, 333, LONGEST):  # less than a page of either side, a page of one side, or a page of both
        answer, moved = ask(cached, prompt[:length], "grows")
        assert answer.right, answer
        assert moved == (length - whole_pages(known, sizes[1])) * token_bytes
        known = length
    judge.check(prompt, answer)


def test_eight_at_the_same_time_twice(cached: Fleet, judge: Judge) -> None:
    asked = some(judge)[-8:] * 2
    calls = [partial(both, cached.prefill, cached.decode, one, salt="eight", max_tokens=TOKENS) for one in asked]
    for prompt, (first, answer) in zip(asked, run_all(calls, 8), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    for server in cached.servers:
        run(empty(server))

"""Real routers in front of a real pair: SGLang's own, old and new, with both of its HTTP interfaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import Judge
from asking import chat, generate
from clients import run
from servers import Fleet, sglang_router, smg

from sampling import amount

pytestmark = pytest.mark.timeout(900)
EVERY = 3
LONGEST = amount(256, 1500)
TOKENS = 8


@pytest.fixture(scope="module", params=[smg, sglang_router], ids=["smg", "sglang_router"])
def front(request: pytest.FixtureRequest, pair: Fleet, logs: Path) -> Iterator[str]:
    """Run a router and yield its URL."""
    with request.param(pair, logs / f"{request.param.__name__}.log") as url:
        yield url


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_generate(front: str, judge: Judge, stream: bool) -> None:
    asked = [prompt for prompt in judge.prompts if len(prompt) <= LONGEST]
    for prompt in asked[stream::EVERY]:
        judge.check(prompt, run(generate(front, prompt, stream=stream, max_tokens=TOKENS)))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_chat_completions(front: str, chats: dict[str, str], stream: bool) -> None:
    for question, text in chats.items():
        answer = run(chat(front, question, stream=stream))
        assert answer.right, answer
        assert answer.text == text

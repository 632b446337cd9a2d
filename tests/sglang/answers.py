"""The reference, which are the answers of a single SGLang server, and the comparison of a pair's answers with it.

If a batch or a chunk has another size, the last bits of a result differ. In float32 they change a token only if two
candidates are almost equally likely, and such prompts are replaced (`clear`). In bfloat16 they may change a token if
two candidates are close, and the tokens after it cannot be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import prompts
from asking import NEW_TOKENS, Answer, Prompt, generate
from clients import run_all
from servers import Server

LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 256, 511, 900, 1500)
"""The lengths of the prompts in tokens: from one to a long prompt, and around the sizes of pages and chunks."""
STRUCTURED: Mapping[str, Any] = {
    "sampling_params": {
        "temperature": 0,
        "max_new_tokens": 48,
        "json_schema": json.dumps(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, "years": {"enum": [7, 70]}},
                "required": ["name", "years"],
            }
        ),
    }
}
"""A request for JSON that every model completes within the number of tokens."""
CLOSE = 0.05
CLEAR = 0.002
"""The smallest difference of the two best candidates' log probabilities at which float32's last bits do not matter."""
_HEAD = 16
_TAIL = 32
_SHORTEST = 200
RANKED = 4


@dataclass(frozen=True)
class Expected:
    """The single server's answer to a prompt."""

    prompt: Prompt
    tokens: list[int]
    text: str
    best: list[list[tuple[float, int]]]
    """The best candidates for each token as (log probability, token), best first."""

    def behind(self, at: int, token: int) -> float:
        """Return the difference of a token's log probability to the best at `at`; infinite if it is no candidate."""
        best = self.best[at][0][0]
        return min((best - logprob for logprob, one in self.best[at] if one == token), default=math.inf)

    @property
    def margin(self) -> float:
        """The smallest difference between the two best candidates of a token."""
        return min(first - second for (first, _), (second, _), *_ in self.best)

    def parts(self, tokens: Sequence[int]) -> int:
        """Return the index of the first token that differs, or the number of tokens if none does."""
        pairs = zip(self.tokens, tokens, strict=False)
        return next((at for at, (right, got) in enumerate(pairs) if right != got), len(tokens))


class Judge:
    """The comparison of answers with the reference. `near` has a line for each answer that differs at a near tie."""

    def __init__(self, expected: Sequence[Expected], close: float) -> None:
        self._expected = {one.prompt: one for one in expected}
        self._close = close
        self.near: list[str] = []
        self.compared = 0

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, the shortest first."""
        return sorted(self._expected, key=len)

    def __getitem__(self, prompt: Prompt) -> Expected:
        return self._expected[prompt]

    def check(self, prompt: Prompt, answer: Answer) -> None:
        """Assert that an answer is the reference, token for token, up to a near tie, which is printed and recorded."""
        expected = self[prompt]
        said = f"prompt of {len(prompt)} tokens: {answer}"
        assert answer.right, said
        assert answer.prompt_tokens == len(prompt), said
        at = expected.parts(answer.tokens)
        self.compared += at
        if at == len(answer.tokens):
            assert at > 0, said
            return
        behind = expected.behind(at, answer.tokens[at])
        line = f"prompt of {len(prompt)} tokens: token {at} is {answer.tokens[at]}, not {expected.tokens[at]}"
        assert behind < self._close, f"{line}, and its log probability is {behind:.3f} below\n{said}"
        self.near.append(f"{line}; their log probabilities are {behind:.3f} apart")
        print(self.near[-1])


def made(model: Path) -> list[Prompt]:
    """Return the prompts, one of each length, cut from the middle of different stories."""
    return [_cut(model, seed, length) for seed, length in enumerate(LENGTHS)]


def _cut(model: Path, seed: int, length: int) -> Prompt:
    return prompts.story(model, seed, max(length, _SHORTEST) + _HEAD + _TAIL)[_HEAD : _HEAD + length]


def clear(single: Server, model: Path, tries: int = 6) -> Judge:
    """Return the judge of answers in float32: one prompt of each length, none of which leads to a near tie."""
    found: list[Expected] = []
    wanted = list(enumerate(LENGTHS))
    for _ in range(tries):
        asked = [_cut(model, seed, length) for seed, length in wanted]
        answered = _answered(single, asked, at_once=8)
        found += [one for one in answered if one.margin >= CLEAR]
        wanted = [
            (seed + len(LENGTHS), length)
            for (seed, length), one in zip(wanted, answered, strict=True)
            if one.margin < CLEAR
        ]
        if not wanted:
            return Judge(found, close=0)
    raise AssertionError(f"prompts of {[length for _, length in wanted]} tokens come to a near tie, {tries} of each")


def reference(single: Server, asked: Sequence[Prompt], close: float, at_once: int = 8) -> Judge:
    """Send all prompts to the single server, and return the judge for the answers of other servers."""
    return Judge(_answered(single, asked, at_once), close)


def _answered(single: Server, asked: Sequence[Prompt], at_once: int) -> list[Expected]:
    requests = [partial(generate, single.url, prompt, top=RANKED, max_tokens=NEW_TOKENS) for prompt in asked]
    answers = run_all(requests, at_once)
    assert all(answer.right for answer in answers), answers
    return [
        Expected(prompt, answer.tokens, answer.text, answer.top) for prompt, answer in zip(asked, answers, strict=True)
    ]

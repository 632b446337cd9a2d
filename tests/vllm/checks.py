"""What a pair must have done and counted: right tokens, no prompt computed on the decode side, nothing left.

What moved is counted by vLLM when it admits a request, by the connector when the tokens have come, by the prefill side
when the prompt was taken, and in bytes on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from clients import Answer
from fixtures import Truth
from fleet import Pair, wait_until
from prompts import Prompt

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 30 * 3 * 2 * 64 * 2
"""Of a block over the packaged model's layers, KV heads, keys and values, head dimension, in bf16."""
SOURCE = "vllm:prompt_tokens_by_source_total"


def totals(pair: Pair) -> dict[str, float]:
    """What the servers have counted so far."""
    decode, prefill = pair.decode, pair.prefill
    return {
        "computed": decode.metric(SOURCE, source="local_compute"),
        "external": decode.metric(SOURCE, source="external_kv_transfer"),
        "cached": decode.metric(SOURCE, source="local_cache_hit"),
        "loaded": decode.metric("vllm:kvroom_tokens_loaded_total"),
        "loaded bytes": decode.metric("vllm:kvroom_handoff_bytes_total", side="sink"),
        "handed over": prefill.metric("vllm:kvroom_tokens_sent_total"),
        "sent bytes": prefill.metric("vllm:kvroom_handoff_bytes_total", side="source"),
        "failed": sum(one.metric("vllm:kvroom_rooms_ended_total", outcome="failed") for one in pair.servers),
    }


@contextmanager
def moved(pair: Pair, asked: Sequence[Prompt], cached: int = 0) -> Iterator[None]:
    """The block moves exactly these prompts, but for so many cached tokens; nothing fails, and nothing is left."""
    before = totals(pair)
    tokens = sum(map(len, asked))
    nbytes = BLOCK_BYTES * (sum(-(-len(prompt) // BLOCK_TOKENS) for prompt in asked) - cached // BLOCK_TOKENS)
    wanted = {
        "computed": 0, "external": tokens - cached, "cached": cached, "loaded": tokens - cached, "loaded bytes": nbytes,
        "handed over": tokens, "sent bytes": nbytes, "failed": 0,
    }  # fmt: skip
    yield
    now: dict[str, float] = {}

    def counted() -> bool:
        now.update({name: count - before[name] for name, count in totals(pair).items()})
        return now == wanted

    wait_until(counted, 20, lambda: f"moved {now}, not {wanted}")
    assert_idle(pair)


def assert_idle(pair: Pair) -> None:
    """Both servers hold no block and no room."""
    for server in pair.servers:
        server.wait_for_usage(0)
        rooms = server.rooms()
        assert rooms["open"] == [], f"{server.name}: {rooms}"


def assert_right(answers: Sequence[Answer], asked: Sequence[Prompt], truth: Truth) -> None:
    """Every answer is the reference, exactly.

    Where rows matter the prefill side's step, which has the prompt's last token besides, makes other last bits than the
    reference's. There an answer may part at a near tie, and of several ones most can be compared all the same.
    """
    agreed = 0
    for number, (answer, prompt) in enumerate(zip(answers, asked, strict=True)):
        said = f"prompt {number} of {len(prompt)} tokens: {answer}"
        assert answer.right, said
        assert answer.prompt_tokens == len(prompt)
        right = truth[prompt].agreed(answer.tokens)
        assert right == len(answer.tokens) or (rows_matter() and right >= 0), said
        agreed += right
    assert len(answers) == 1 or 2 * agreed >= sum(len(answer.tokens) for answer in answers), answers


@cache
def rows_matter() -> bool:
    """Whether a row of a product in bf16 depends on how many rows there are, as it does with AMX.

    Asked of products of the packaged model's sizes.
    """
    draw = torch.Generator().manual_seed(0)
    for inner, outer in ((576, 576), (576, 192), (576, 3072), (1536, 576)):
        rows, weights = (torch.randn(n, inner, generator=draw).bfloat16() for n in (64, outer))
        whole = rows @ weights.T
        if not all(torch.equal(whole[:n], rows[:n] @ weights.T) for n in range(16, 64)):
            return True
    return False

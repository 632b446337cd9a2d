"""Checks of a pair: the tokens are right, the decode side computed no prompt, the counts agree, nothing is left.

vLLM counts tokens when it admits a request, the connector when they have arrived, and the prefill side when the prompt
was taken. Both sides count bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clients import Answer
from fixtures import Truth
from fleet import Pair, wait_until
from prompts import Prompt

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * 30 * 3 * 2 * 64 * 4
"""Bytes of a block: tokens x layers x KV heads x (K, V) x head size of the packaged model x 4 (float32)."""
SOURCE = "vllm:prompt_tokens_by_source_total"


def totals(pair: Pair) -> dict[str, float]:
    """Return the counts of both servers since their start."""
    decode, prefill = pair.decode, pair.prefill
    return {
        "computed": decode.metric(SOURCE, source="local_compute"),
        "external": decode.metric(SOURCE, source="external_kv_transfer"),
        "cached": decode.metric(SOURCE, source="local_cache_hit"),
        "loaded": decode.metric("vllm:kvroom_tokens_loaded_total"),
        "loaded bytes": decode.metric("vllm:kvroom_handoff_bytes_total", side="decode"),
        "handed over": prefill.metric("vllm:kvroom_tokens_sent_total"),
        "sent bytes": prefill.metric("vllm:kvroom_handoff_bytes_total", side="prefill"),
        "failed": sum(one.metric("vllm:kvroom_rooms_ended_total", outcome="failed") for one in pair.servers),
    }


@contextmanager
def moved(pair: Pair, asked: Sequence[Prompt], cached: int = 0) -> Iterator[None]:
    """Check that the body moves exactly these prompts, except for `cached` tokens. Nothing fails, nothing is left."""
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
    """Check that no server holds a block or a room."""
    for server in pair.servers:
        server.wait_for_usage(0)
        rooms = server.rooms()
        assert rooms["open"] == [], f"{server.name}: {rooms}"


def assert_right(answers: Sequence[Answer], asked: Sequence[Prompt], truth: Truth) -> None:
    """Check that every answer is the reference, token for token."""
    for number, (answer, prompt) in enumerate(zip(answers, asked, strict=True)):
        said = f"prompt {number} of {len(prompt)} tokens: {answer}"
        assert answer.right, said
        assert answer.prompt_tokens == len(prompt), said
        assert answer.tokens == truth[prompt], f"{said}, not {truth[prompt]}"

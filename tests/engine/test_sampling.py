"""Sampling is repeatable, filters as transformers does, and uses one random number for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvroom.engine.request import Request, check_request
from kvroom.engine.sampling import Sampler
from kvroom.errors import InvalidRequest

VOCAB = 40


def request(**fields: Any) -> Request:
    return Request(**{"request_id": "r", "prompt_ids": (1, 2), "bootstrap_room": 1, **fields})


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_takes_the_most_likely_and_says_how_likely() -> None:
    choice = Sampler(request()).choose(logits())
    assert choice.token_id == int(logits().argmax())
    assert choice.logprob == pytest.approx(float(logits().log_softmax(0).max()))


BIASES = ((3, 4.0), (17, -100.0), (30, 100.0))


def warped(scores: torch.Tensor, asked: Request) -> torch.Tensor:
    """Return the scores [vocab] after the warpers of transformers."""
    scores = scores[None]
    if asked.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in asked.logit_bias])(
            torch.zeros(1, 1, dtype=torch.int64), scores
        )
    scores = TemperatureLogitsWarper(asked.temperature)(None, scores)
    if asked.top_k > 0:
        scores = TopKLogitsWarper(asked.top_k)(None, scores)
    if asked.top_p < 1:
        scores = TopPLogitsWarper(asked.top_p)(None, scores)
    if asked.min_p > 0:
        scores = MinPLogitsWarper(asked.min_p)(None, scores)
    return scores[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_k": -1, "top_p": 0.6},
        {"temperature": 0.8, "top_k": 10, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.3},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 2.0, "logit_bias": BIASES[:2]},
        {"temperature": 1.0, "logit_bias": BIASES},
        {"temperature": 1.2, "logit_bias": BIASES[:1], "min_p": 0.05},
    ],
)
def test_frequencies_are_those_of_the_warped_distribution(fields: dict[str, Any]) -> None:
    asked = request(**fields, seed=7)
    expected = warped(logits(), asked).softmax(0)
    sampler = Sampler(asked)
    draws = 4000
    counts = torch.bincount(torch.tensor([sampler.choose(logits()).token_id for _ in range(draws)]), minlength=VOCAB)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((counts / draws - expected).abs().sum()) < 0.12


def test_a_bias_moves_the_most_likely_token_and_not_its_logprob() -> None:
    choice = Sampler(request(logit_bias=((5, 100.0),))).choose(logits())
    assert choice.token_id == 5
    assert choice.logprob == pytest.approx(float(logits().log_softmax(0)[5]))
    best = int(logits().argmax())
    assert Sampler(request(logit_bias=((best, -100.0),))).choose(logits()).token_id != best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_withheld_comes_after_min_tokens_and_not_before(temperature: float) -> None:
    best = int(logits().argmax())
    asked = request(temperature=temperature, seed=3, min_tokens=5, withheld=(best, 7), logit_bias=((7, 100.0),))
    prefill, decode = Sampler(asked), Sampler(asked, drawn=1)
    tokens = [prefill.choose(logits()).token_id, *(decode.choose(logits()).token_id for _ in range(7))]
    assert not {best, 7} & set(tokens[:5])
    assert tokens[5:] == [7] * 3
    reference = MinNewTokensLengthLogitsProcessor(prompt_length_to_skip=0, min_new_tokens=5, eos_token_id=[best, 7])
    for step in range(5):
        scores = reference(torch.zeros(1, step, dtype=torch.int64), logits()[None])[0]
        assert scores[tokens[step]] > -torch.inf


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_the_lowest_temperature_is_greedy(temperature: float) -> None:
    assert Sampler(request(temperature=temperature, seed=1)).choose(logits()).token_id == int(logits().argmax())


def test_a_seed_repeats_and_the_decode_side_continues_where_prefill_stopped() -> None:
    asked = request(temperature=1.0, seed=11)
    whole = Sampler(asked)
    tokens = [whole.choose(logits(step)).token_id for step in range(20)]
    again = Sampler(asked)
    assert [again.choose(logits(step)).token_id for step in range(20)] == tokens
    first, rest = Sampler(asked), Sampler(asked, drawn=1)
    assert [first.choose(logits(0)).token_id, *(rest.choose(logits(s)).token_id for s in range(1, 20))] == tokens
    other = Sampler(request(temperature=1.0, seed=12))
    assert [other.choose(logits(step)).token_id for step in range(20)] != tokens


def test_without_a_seed_two_requests_differ() -> None:
    one, other = Sampler(request(temperature=1.0)), Sampler(request(temperature=1.0))
    flat = torch.zeros(VOCAB)
    assert [one.choose(flat) for _ in range(20)] != [other.choose(flat) for _ in range(20)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_ids": ()}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 63}, "add up to 65, and the model has 64 positions"),
        ({"prompt_ids": (1, VOCAB)}, r"outside \[0, 40\)"),
        ({"prompt_ids": (-1,)}, r"outside \[0, 40\)"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 2**63}, "seed is"),
        ({"stop": ("x", "")}, "stop string is empty"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"logit_bias": ((VOCAB, 1.0),)}, r"logit_bias names a token id outside \[0, 40\)"),
        ({"logit_bias": ((1, 100.5),)}, r"outside \[-100, 100\]"),
        ({"min_tokens": 129}, "min_tokens is 129: it must be in .*, which is 128"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"withheld": (VOCAB,)}, "withheld contains a token id"),
        ({"bootstrap_room": 2**63}, "bootstrap_room is"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    check_request(request(), vocab_size=VOCAB, model_tokens=200)
    with pytest.raises(InvalidRequest, match=named):
        check_request(request(**fields), vocab_size=VOCAB, model_tokens=64 if "max_tokens" in fields else 200)

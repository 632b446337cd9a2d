"""Choosing tokens: repeatable, cut as transformers cuts, one random number for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, -1, 0.6), (0.8, 10, 0.8)]
)
def test_frequencies_are_those_of_the_warped_distribution(temperature: float, top_k: int, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, logits()[None])
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores[0].softmax(0)
    sampler = Sampler(request(temperature=temperature, top_k=top_k, top_p=top_p, seed=7))
    draws = 4000
    counts = torch.bincount(torch.tensor([sampler.choose(logits()).token_id for _ in range(draws)]), minlength=VOCAB)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((counts / draws - expected).abs().sum()) < 0.12


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
        ({"max_tokens": 63}, "come to 65, and the model has 64 positions"),
        ({"prompt_ids": (1, VOCAB)}, r"outside \[0, 40\)"),
        ({"prompt_ids": (-1,)}, r"outside \[0, 40\)"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 2**63}, "seed is"),
        ({"stop": ("x", "")}, "stop string is empty"),
        ({"bootstrap_room": 2**63}, "bootstrap_room is"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    check_request(request(), vocab_size=VOCAB, model_tokens=200)
    with pytest.raises(InvalidRequest, match=named):
        check_request(request(**fields), vocab_size=VOCAB, model_tokens=64 if "max_tokens" in fields else 200)

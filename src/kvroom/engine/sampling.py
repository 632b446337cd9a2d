"""Sampling of tokens from logits. Each token uses exactly one random number from its request's own generator.

Token i of a request therefore depends only on the seed, the logits and i, and not on the other requests of the batch.
The decode side skips one random number to continue a sequence whose first token the prefill side sampled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .request import Request


class ChosenToken(NamedTuple):
    token_id: int
    logprob: float


class Sampler:
    """The sampler of one request. `drawn` is the number of its tokens that another engine has chosen already."""

    def __init__(self, request: Request, *, drawn: int = 0) -> None:
        self._request = request
        self._chosen = drawn
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        torch.rand(drawn, generator=self._generator, dtype=torch.float64)

    def choose(self, logits: torch.Tensor) -> ChosenToken:
        """Return the next token for `logits` (float32 [vocab], CPU) and its natural logprob in these raw logits."""
        number = float(torch.rand(1, generator=self._generator, dtype=torch.float64))
        request, scores = self._request, logits
        withheld = request.withheld if self._chosen < request.min_tokens else ()
        if request.logit_bias or withheld:
            scores = logits.clone()
        if request.logit_bias:
            tokens, biases = zip(*request.logit_bias, strict=True)
            scores[list(tokens)] += torch.tensor(biases, dtype=scores.dtype)
        if withheld:
            scores[list(withheld)] = -torch.inf
        token_id = int(scores.argmax()) if request.temperature == 0.0 else self._draw(scores, number)
        self._chosen += 1
        return ChosenToken(token_id, float(logits[token_id] - logits.logsumexp(0)))

    def _draw(self, logits: torch.Tensor, number: float) -> int:
        """Invert the cumulative distribution at `number` in [0, 1), most likely tokens first.

        `top_k` is applied first. Then `top_p` keeps the most likely tokens up to and including the one that crosses the
        limit. Last, `min_p` removes tokens that are less likely than that fraction of the most likely one. This is the
        order of the warpers in transformers.
        """
        request = self._request
        # The largest score is 0 after the subtraction, so even a tiny temperature does not make it infinite.
        scores = (logits.double() - logits.max()) / request.temperature
        probabilities, tokens = scores.softmax(0).sort(descending=True, stable=True)
        # Without tokens of probability 0, which rounding could otherwise select at the end of the distribution.
        probabilities = probabilities[: max(1, int((probabilities > 0.0).sum()))]
        if request.top_k > 0:
            probabilities = probabilities[: request.top_k]
        cumulative = probabilities.cumsum(0)
        if request.top_p < 1.0:
            kept = int((cumulative - probabilities < request.top_p * cumulative[-1]).sum())
            cumulative = cumulative[:kept]
        if request.min_p > 0.0:
            cumulative = cumulative[: int((probabilities >= request.min_p * probabilities[0]).sum())]
        rank = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
        return int(tokens[min(rank, len(cumulative) - 1)])

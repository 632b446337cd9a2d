"""From logits to a token. Each token costs its request exactly one random number, drawn from its own generator.

So token i of a request depends on its seed, its logits and i, and on nothing else in the batch; and the decode side
continues a sequence whose first token was drawn on the prefill side by skipping one number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .request import Request


class ChosenToken(NamedTuple):
    token_id: int
    logprob: float


class Sampler:
    """Chooses the tokens of one request. `drawn`: how many of them were chosen elsewhere already."""

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
        """The next token for `logits` (float32 [vocab], CPU) and its natural logprob in the logits as they came."""
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

        `top_k` cuts first, `top_p` cuts what is left of it and keeps the token that crosses the border, `min_p` cuts
        what is less likely than its share of the most likely token, as transformers' warpers do in their usual order.
        """
        request = self._request
        # The largest is 0 after the subtraction, so that no temperature, however low, makes it infinite.
        scores = (logits.double() - logits.max()) / request.temperature
        probabilities, tokens = scores.softmax(0).sort(descending=True, stable=True)
        probabilities = probabilities[: max(1, int((probabilities > 0.0).sum()))]  # what is ruled out is no remainder
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

"""From logits to a token. Each token costs its request exactly one random number, drawn from its own generator.

So token i of a request depends on its seed, its logits and i, and on nothing else in the batch; and the decode side
continues a sequence whose first token was drawn on the prefill side by skipping one number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvroom.engine.request import Request


class Choice(NamedTuple):
    token_id: int
    logprob: float


class Sampler:
    """Chooses the tokens of one request. `drawn`: how many of them were chosen elsewhere already."""

    def __init__(self, request: Request, *, drawn: int = 0) -> None:
        self._request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        torch.rand(drawn, generator=self._generator, dtype=torch.float64)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token for `logits` (float32 [vocab], CPU) and its natural logprob in the logits as they came."""
        number = float(torch.rand(1, generator=self._generator, dtype=torch.float64))
        token_id = int(logits.argmax()) if self._request.temperature == 0.0 else self._draw(logits, number)
        return Choice(token_id, float(logits[token_id] - logits.logsumexp(0)))

    def _draw(self, logits: torch.Tensor, number: float) -> int:
        """Invert the cumulative distribution at `number` in [0, 1), most likely tokens first.

        `top_k` cuts first, `top_p` cuts what is left of it and keeps the token that crosses the border, as
        transformers' warpers do in their usual order.
        """
        request = self._request
        probabilities, tokens = (logits.double() / request.temperature).softmax(0).sort(descending=True, stable=True)
        if request.top_k > 0:
            probabilities = probabilities[: request.top_k]
        cumulative = probabilities.cumsum(0)
        if request.top_p < 1.0:
            kept = int((cumulative - probabilities < request.top_p * cumulative[-1]).sum())
            cumulative = cumulative[:kept]
        rank = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
        return int(tokens[min(rank, len(cumulative) - 1)])

"""What goes into an engine and what comes out of it: plain frozen values, no tensors, no handles.

A request is checked once, by `check_request`, before anything is allocated or any room is touched.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvroom import KVIdentity
from kvroom.errors import InvalidRequest

FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and how to continue it. Both sides of a room get the same one.

    `temperature` 0 is greedy; `top_k` 0 or -1 is off; `top_p` 1 is off; `min_p` 0 is off. `logit_bias` are pairs of a
    token id and what is added to its logit. None of `withheld`, token ids, is chosen among the first `min_tokens`
    tokens. With a `seed` the tokens repeat, whatever else is in the batch, up to rounding of the logits.
    `bootstrap_addr` ("host:port") matters to the decode side.
    Requests share pages of the prefix cache only if their `cache_salt` is the same (a name of vLLM's): a server with
    several tenants gives each its own, so that none can find out by timing what another has asked.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    bootstrap_room: int
    bootstrap_addr: str = ""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    withheld: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""

    @property
    def identity(self) -> KVIdentity:
        """What decides its KV cache, for its room. This engine has neither adapters nor images."""
        return KVIdentity.of(self.prompt_ids, adapter="", cache_salt=self.cache_salt, images="")


class FirstToken(msgspec.Struct, frozen=True):
    """The token that the prefill side sampled. `logprob` is natural, of the raw logits.

    `cached_tokens`: those of the prompt that it had in its cache, and so did not compute.
    """

    token_id: int
    logprob: float | None = None
    cached_tokens: int = 0


class PrefillResult(msgspec.Struct, frozen=True, kw_only=True):
    """A hand-off that succeeded, as the prefill side saw it. `handoff_s`: from the last chunk's send to Success."""

    first_token: FirstToken
    prompt_tokens: int
    pages: int
    nbytes: int
    transport: str
    handoff_s: float


class GenerationStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one generation took on the decode side.

    `cached_tokens` of the prompt were in the prefill side's cache, and not computed; `prefix_tokens` were in this
    side's, and not handed over. `pages` and `nbytes` are those that were; `handoff_s` is from both sides being ready to
    the last byte, on the prefill side's clock; `ttft_s` is from `generate` to the first token.
    `prompt_tokens_computed` counts the prompt positions that went through this engine's model: 0, or the hand-off was
    for nothing.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prefix_tokens: int
    prompt_tokens_computed: int
    pages: int
    nbytes: int
    transport: str
    handoff_s: float
    ttft_s: float


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One token. `text` is what became certain with it: it may be empty, and it may end a character begun earlier.

    The last event of a generation carries `finish_reason` and `stats`.
    """

    token_id: int
    text: str
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None


def check_request(request: Request, *, vocab_size: int, model_tokens: int) -> None:
    """Raise `InvalidRequest` for a request that a model of `model_tokens` positions can never serve."""
    prompt_tokens = len(request.prompt_ids)
    faults = [
        (prompt_tokens == 0, "the prompt is empty: send at least one token"),
        (request.max_tokens < 1, f"max_tokens is {request.max_tokens}: it must be at least 1"),
        (
            prompt_tokens + request.max_tokens > model_tokens,
            f"{prompt_tokens} prompt tokens and max_tokens {request.max_tokens} come to "
            f"{prompt_tokens + request.max_tokens}, and the model has {model_tokens} positions: shorten the prompt or "
            f"lower max_tokens",
        ),
        (
            not all(0 <= token < vocab_size for token in request.prompt_ids),
            f"the prompt holds a token id outside [0, {vocab_size}): use this model's tokenizer",
        ),
        (not 0.0 <= request.temperature <= 100.0, f"temperature is {request.temperature}: it must be in [0, 100]"),
        (not 0.0 < request.top_p <= 1.0, f"top_p is {request.top_p}: it must be in (0, 1]"),
        (request.top_k < -1, f"top_k is {request.top_k}: it must be positive, or 0 or -1 for off"),
        (not 0.0 <= request.min_p <= 1.0, f"min_p is {request.min_p}: it must be in [0, 1]"),
        (
            not all(0 <= token < vocab_size for token, _ in request.logit_bias),
            f"logit_bias names a token id outside [0, {vocab_size}): use this model's tokenizer",
        ),
        (
            not all(-100.0 <= bias <= 100.0 for _, bias in request.logit_bias),
            "logit_bias adds more than 100 or less than -100: stay within [-100, 100]",
        ),
        (
            not 0 <= request.min_tokens <= request.max_tokens,
            f"min_tokens is {request.min_tokens}: it must be in [0, max_tokens], which is {request.max_tokens}",
        ),
        (
            not all(0 <= token < vocab_size for token in request.withheld),
            f"withheld holds a token id outside [0, {vocab_size}): use this model's tokenizer",
        ),
        (
            request.seed is not None and not 0 <= request.seed < 2**63,
            f"seed is {request.seed}: it must be in [0, 2**63)",
        ),
        (not 0 <= request.bootstrap_room < 2**63, f"bootstrap_room is {request.bootstrap_room}: not in [0, 2**63)"),
        ("" in request.stop, "a stop string is empty: remove it"),
    ]
    for wrong, message in faults:
        if wrong:
            raise InvalidRequest(message)

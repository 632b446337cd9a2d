"""The inputs and outputs of an engine: plain frozen values without tensors or handles.

`check_request` checks a request once, before memory is allocated or a room is opened.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvroom import KVIdentity, RequestTrace
from kvroom.errors import InvalidRequest, LocalRoomError

FinishReason = Literal["stop", "length"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and the options of its continuation. Both sides of a room get the same request."""

    request_id: str
    """Its id in logs: 1 to 128 visible ASCII characters."""
    traceparent: str | None = None
    """Its place in a distributed trace, for logs (see `kvroom.RequestTrace`)."""
    prompt_ids: tuple[int, ...]
    bootstrap_room: int
    bootstrap_addr: str = ""
    """"host:port" of the prefill side's bootstrap directory. Only the decode side uses it."""
    max_tokens: int = 128
    temperature: float = 0.0
    """0 always chooses the most likely token."""
    top_p: float = 1.0
    """1 disables it."""
    top_k: int = 0
    """0 and -1 disable it."""
    min_p: float = 0.0
    """0 disables it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and a number that is added to its logit."""
    min_tokens: int = 0
    """None of `withheld` is chosen for the first `min_tokens` tokens."""
    withheld: tuple[int, ...] = ()
    """Token ids, usually those that end a generation."""
    seed: int | None = None
    """The same seed gives the same tokens in any batch, up to rounding of the logits. None: a random seed."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation. The text ends before the first of them."""
    ignore_eos: bool = False
    """Continue after a token that would end the generation."""
    cache_salt: str = ""
    """Requests share pages of the prefix cache only if their salts are equal (vLLM uses the same name).

    A server with several tenants gives each tenant its own salt. Otherwise a tenant could find out by timing which
    prompts other tenants have sent.
    """

    @property
    def identity(self) -> KVIdentity:
        """Identity of the KV cache, for the room. This engine has neither adapters nor images."""
        return KVIdentity.of(self.prompt_ids, adapter="", cache_salt=self.cache_salt, images="")

    @property
    def trace(self) -> RequestTrace:
        """The id and the `traceparent`, for the room's log records and views."""
        return RequestTrace(self.request_id, self.traceparent)


class FirstToken(msgspec.Struct, frozen=True):
    """The token that the prefill side sampled."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of the probability, from the raw logits."""
    cached_tokens: int = 0
    """Prompt tokens that the prefill side found in its prefix cache and did not compute."""


class PrefillResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a successful hand-off on the prefill side."""

    first_token: FirstToken
    prompt_tokens: int
    pages: int
    nbytes: int
    transport: str
    handoff_s: float
    """Seconds from the `send` of the last chunk to Success."""


class GenerationStats(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of one generation on the decode side."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that the prefill side found in its prefix cache and did not compute."""
    prefix_tokens: int
    """Prompt tokens that the decode side found in its prefix cache, so that they were not handed over."""
    prompt_tokens_computed: int
    """Prompt tokens that went through the decode engine's model. A number other than 0 is a bug."""
    pages: int
    """Pages that were handed over."""
    nbytes: int
    """Bytes that were handed over."""
    transport: str
    handoff_s: float
    """Seconds from the moment that both sides were ready to the last byte, on the prefill side's clock."""
    ttft_s: float
    """Seconds from the call of `generate` to the first token."""


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One generated token."""

    token_id: int
    text: str
    """The text that this token completes. It may be empty, and may complete a character of earlier tokens."""
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    """Set in the last event of a generation only, as is `stats`."""
    stats: GenerationStats | None = None


def check_request(request: Request, *, vocab_size: int, model_tokens: int) -> None:
    """Raise `InvalidRequest` for a request that a model of `model_tokens` positions can never serve."""
    prompt_tokens = len(request.prompt_ids)
    faults = [
        (prompt_tokens == 0, "the prompt is empty: send at least one token"),
        (request.max_tokens < 1, f"max_tokens is {request.max_tokens}: it must be at least 1"),
        (
            prompt_tokens + request.max_tokens > model_tokens,
            f"{prompt_tokens} prompt tokens and max_tokens {request.max_tokens} add up to "
            f"{prompt_tokens + request.max_tokens}, and the model has {model_tokens} positions: shorten the prompt or "
            f"lower max_tokens",
        ),
        (
            not all(0 <= token < vocab_size for token in request.prompt_ids),
            f"the prompt contains a token id outside [0, {vocab_size}): use this model's tokenizer",
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
            "a value of logit_bias is outside [-100, 100]: choose a value within these limits",
        ),
        (
            not 0 <= request.min_tokens <= request.max_tokens,
            f"min_tokens is {request.min_tokens}: it must be in [0, max_tokens], which is {request.max_tokens}",
        ),
        (
            not all(0 <= token < vocab_size for token in request.withheld),
            f"withheld contains a token id outside [0, {vocab_size}): use this model's tokenizer",
        ),
        (
            request.seed is not None and not 0 <= request.seed < 2**63,
            f"seed is {request.seed}: it must be in [0, 2**63)",
        ),
        (
            not 0 <= request.bootstrap_room < 2**63,
            f"bootstrap_room is {request.bootstrap_room}: it must be in [0, 2**63)",
        ),
        ("" in request.stop, "a stop string is empty: remove it"),
    ]
    try:
        request.trace.checked()
    except LocalRoomError as error:
        raise InvalidRequest(str(error)) from None
    for wrong, message in faults:
        if wrong:
            raise InvalidRequest(message)

"""From a checked call to the engine's requests: chat template, tokenizer, and how long an answer may become."""

from __future__ import annotations

from typing import Any

import jinja2

from kvroom.engine.request import Request
from kvroom.serve.schema import Call, ChatMessage, Prompt
from kvroom.status.answers import BadRequest


class Prompts:
    """Turns calls into requests for one model.

    `tokenizer` is a transformers tokenizer; `room_tokens` is how many tokens (prompt and answer) one sequence may have
    here, and bounds an answer whose length the client left open.
    """

    def __init__(self, tokenizer: Any, room_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._room_tokens = room_tokens

    def requests(self, call: Call, request_id: str) -> list[Request]:
        """One request per sequence; with a seed, sequence i of the call takes seed + i. Raises `BadRequest`."""
        given = zip(call.prompts, call.rooms, call.addresses, strict=True)
        return [
            self._request(call, prompt, f"{request_id}-{index}", index, room, address)
            for index, (prompt, room, address) in enumerate(given)
        ]

    def _request(self, call: Call, prompt: Prompt, request_id: str, index: int, room: int, address: str) -> Request:
        prompt_ids = self._encode(prompt)
        wanted = call.sampling
        left = max(1, self._room_tokens - len(prompt_ids))
        return Request(
            request_id=request_id,
            prompt_ids=tuple(prompt_ids),
            bootstrap_room=room,
            bootstrap_addr=address,
            max_tokens=left if wanted.max_tokens is None else wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            seed=None if wanted.seed is None else (wanted.seed + index) % 2**63,
            stop=wanted.stop,
            ignore_eos=wanted.ignore_eos,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        if prompt and isinstance(prompt[0], ChatMessage):
            return self._encode_chat([turn.plain() for turn in prompt if isinstance(turn, ChatMessage)])
        return [token for token in prompt if isinstance(token, int)]

    def _encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as fault:
            raise BadRequest(f"the model's chat template refuses these messages: {fault}", "messages") from fault
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(text, add_special_tokens=False))

"""The answers of the three generating routes, in one piece and in chunks.

Their shapes are those of the OpenAI API (`text_completion`, `chat.completion`, `chat.completion.chunk`) and of SGLang
(`/generate`: text and `output_ids` so far, `meta_info`). In addition, every body that ends a choice has a member
`kvroom`: a list with the hand-off costs of each ended choice and its `index`. Routers pass it on unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .schema import Call, Route

Body = dict[str, Any]

_PREFIX: dict[Route, str] = {"generate": "gen", "completions": "cmpl", "chat": "chatcmpl"}


@dataclass
class Choice:
    """The present state of one sequence of a call.

    `cost` (which contains the index) and `cached_tokens` (prompt tokens that the prefill worker did not compute) are
    set together with `finish_reason`.
    """

    index: int
    prompt_ids: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    cost: Body = field(default_factory=dict)

    def extend(self, text: str, token_ids: Sequence[int], finish_reason: str | None) -> None:
        """Append the output of one engine step."""
        self.text += text
        self.token_ids.extend(token_ids)
        self.finish_reason = finish_reason


class ReplyBuilder:
    """A builder of the answers to one call: `chunk` per step and then `usage`, or `whole` once."""

    def __init__(self, call: Call, model: str, request_id: str) -> None:
        self._call = call
        self._route: Route = call.route
        self.id = f"{_PREFIX[call.route]}-{request_id}"
        self._head: Body = {"id": self.id, "created": int(time.time()), "model": model}

    def opening(self, choice: Choice) -> Body | None:
        """Return the chunk before a choice's text: the role in a chat, None on the other routes."""
        if self._route != "chat":
            return None
        part = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._chunk(choice, part)

    def chunk(self, choice: Choice, text: str, token_ids: Sequence[int]) -> Body:
        """Return the chunk of one step of a choice. `text` and `token_ids` are new; `choice` already includes them."""
        if self._route == "generate":
            return self._generated(choice)
        part: Body = {"index": choice.index, "finish_reason": choice.finish_reason}
        if self._route == "chat":
            part["delta"] = {"content": text} if text else {}
        else:
            part["text"] = text
        if self._call.return_token_ids:
            part["token_ids"] = list(token_ids)
        body = self._chunk(choice, part)
        if choice.finish_reason is not None:
            body["kvroom"] = [choice.cost]
        return body

    def usage(self, choices: Sequence[Choice]) -> Body | None:
        """Return the last chunk if `stream_options.include_usage` requests it, else None."""
        if not self._call.include_usage:
            return None
        return {**self._head, "object": self._object(stream=True), "choices": [], "usage": self._usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> Body | list[Body]:
        """Return the answer in one piece."""
        if self._route == "generate":
            bodies = [self._generated(choice) for choice in choices]
            return bodies if self._call.batched else bodies[0]
        parts = []
        for choice in choices:
            part: Body = {"index": choice.index, "finish_reason": choice.finish_reason, "logprobs": None}
            if self._route == "chat":
                part["message"] = {"role": "assistant", "content": choice.text}
            else:
                part["text"] = choice.text
            if self._call.return_token_ids:
                part["token_ids"] = choice.token_ids
                part["prompt_token_ids"] = list(choice.prompt_ids)
            parts.append(part)
        return {
            **self._head,
            "object": self._object(stream=False),
            "choices": parts,
            "usage": self._usage(choices),
            "kvroom": [choice.cost for choice in choices],
        }

    def handed_over(self, choices: Sequence[Choice]) -> Body:
        """Return the prefill worker's short answer, without text: the decode worker has the pages."""
        return {
            **self._head,
            "object": self._object(stream=False),
            "choices": [],
            "usage": self._usage(choices),
            "kvroom": [choice.cost for choice in choices],
        }

    def _usage(self, choices: Sequence[Choice]) -> Body:
        """Count tokens as OpenAI does: each prompt once, regardless of its choices.

        Cached tokens of a prompt are those that the prefill worker computed for none of its choices.
        """
        by_prompt: dict[int, list[Choice]] = {}
        for choice in choices:
            by_prompt.setdefault(choice.index // self._call.samples, []).append(choice)
        prompt = sum(len(group[0].prompt_ids) for group in by_prompt.values())
        completion = sum(len(choice.token_ids) for choice in choices)
        cached = sum(min(choice.cached_tokens for choice in group) for group in by_prompt.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _object(self, *, stream: bool) -> str:
        if self._route == "chat":
            return "chat.completion.chunk" if stream else "chat.completion"
        return "text_completion"

    def _chunk(self, choice: Choice, part: Body) -> Body:
        body = {**self._head, "object": self._object(stream=True), "choices": [part]}
        if self._call.continuous_usage:
            body["usage"] = self._usage([choice])
        return body

    def _generated(self, choice: Choice) -> Body:
        ended = choice.finish_reason
        reason: Body | None = None if ended is None else {"type": ended}
        if reason is not None and ended == "length":
            reason["length"] = len(choice.token_ids)
        body: Body = {
            "text": choice.text,
            "output_ids": list(choice.token_ids),
            "meta_info": {
                "id": self.id,
                "finish_reason": reason,
                "prompt_tokens": len(choice.prompt_ids),
                "completion_tokens": len(choice.token_ids),
                "cached_tokens": choice.cached_tokens,
            },
        }
        if self._call.batched:
            body["index"] = choice.index
        if ended is not None:
            body["kvroom"] = [choice.cost]
        return body

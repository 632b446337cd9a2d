"""A client of the OpenAI-style streams: one chat completion, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from kvroom.errors import KVRoomError
from kvroom.http import request


@dataclass
class Answer:
    """What came of one stream. `cost` is the worker's `kvroom` object, `usage` the token counts."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, body: dict[str, Any]) -> str:
        """Add one event; returns its text."""
        if "error" in body:
            raise KVRoomError(f"the stream ended with an error: {body['error']}")
        self.usage = body.get("usage") or self.usage
        for cost in body.get("kvroom") or ():
            self.cost = cost
        fresh = ""
        for choice in body["choices"]:
            fresh += choice["delta"].get("content") or ""
            self.token_ids += choice.get("token_ids") or ()
        self.text += fresh
        return fresh


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, content: str, max_tokens: int, answer: Answer
) -> AsyncGenerator[str, None]:
    """Stream the greedy answer to one user turn; yields its text as it comes and fills `answer`.

    Raises `KVRoomError` with the server's words when it refuses.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    async with request(session, "POST", url, "/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise KVRoomError(f"{url} answered {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not data or not line.startswith(b"data: "):
                continue
            if data == b"[DONE]":
                return
            yield answer.take(msgspec.json.decode(data))
    raise KVRoomError(f"{url} closed the stream before its end")

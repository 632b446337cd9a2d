"""The prefill worker: computes a prompt, hands its pages over, and only then answers, briefly.

It knows its role: `max_tokens`, `stream` and the rest of the body are meant for the decode worker. Its 200 says that
the hand-off is decided, so a router that sees an error here can still try the whole request again in a new room.
"""

from __future__ import annotations

from typing import ClassVar

from aiohttp import web

from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import Request
from kvroom.serve.app import Exchange, ModelCard, Worker
from kvroom.serve.tasks import together


class PrefillServer(Worker):
    """The HTTP face of a `PrefillEngine`."""

    role: ClassVar[str] = "prefill"

    def __init__(self, engine: PrefillEngine, card: ModelCard) -> None:
        super().__init__(engine, card)
        self._engine = engine

    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """200 when every sequence's pages are with the decode worker."""
        results = await together([self._engine.prefill(request) for request in exchange.requests])
        costs = [
            self._recent.note(request, index, result)
            for index, (request, result) in enumerate(zip(exchange.requests, results, strict=True))
        ]
        prompt_tokens = sum(result.prompt_tokens for result in results)
        cached_tokens = sum(result.first_token.cached_tokens for result in results)
        return web.json_response(exchange.reply.handed_over(prompt_tokens, cached_tokens, costs))

    def refused(self, requests: list[Request], cause: str) -> None:
        """Tell the decode side, which may be waiting in these rooms."""
        for request in requests:
            self._engine.refuse(request.bootstrap_room, cause)

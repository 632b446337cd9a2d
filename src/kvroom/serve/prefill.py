"""The prefill worker: computes a prompt, hands its pages over, and then sends a short answer.

`max_tokens`, `stream` and most other options of the body concern the decode worker only. The status 200 means that the
hand-off succeeded. After an error, a router can retry the whole request in a new room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from aiohttp import web

from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import PrefillResult, Request
from kvroom.errors import KVRoomError

from .app import EngineServer, Exchange, ModelCard
from .naming import current
from .probe import Probe
from .replies import Choice
from .schema import RoomEnd
from .tasks import together


class PrefillServer(EngineServer):
    """The HTTP server of a `PrefillEngine`."""

    role: ClassVar[str] = "prefill"

    def __init__(self, engine: PrefillEngine, card: ModelCard, probe: Probe) -> None:
        super().__init__(engine, card, probe)
        self._engine = engine

    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """Answer 200 when the decode worker has the pages of every sequence."""
        results = await together([self._noted(request, index) for index, request in enumerate(exchange.requests)])
        self._produced += len(results)
        choices = []
        for index, (request, result) in enumerate(zip(exchange.requests, results, strict=True)):
            cached, cost = result.first_token.cached_tokens, self._recent.note(request, index, result)
            choices.append(Choice(index, request.prompt_ids, cached_tokens=cached, cost=cost))
        return web.json_response(exchange.reply.handed_over(choices))

    def refused(self, legs: Sequence[RoomEnd], detail: str) -> None:
        """Tell the decode sides, whose rooms may be waiting for the prompt."""
        for leg in legs:
            self._engine.refuse(leg.room, detail, trace=current())

    async def _noted(self, request: Request, index: int) -> PrefillResult:
        """Hand one sequence over. Note its failure, also that of a client that leaves."""
        try:
            return await self._engine.prefill(request)
        except KVRoomError as error:
            self._recent.note_failure(request, index, str(error))
            raise
        except asyncio.CancelledError as cancelled:
            why = next(iter(cancelled.args), None) or "the client of the prefill worker left"
            self._recent.note_failure(request, index, f"cancelled: {why}")
            raise

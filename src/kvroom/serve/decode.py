"""The decode worker: opens the rooms, waits for the pages, and answers with the text that it generates.

The status 200 of a stream is sent with its first token, so an earlier failure gets its own status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import ClassVar

import msgspec
from aiohttp import web

from kvroom.engine.decode import DecodeEngine
from kvroom.engine.request import Request, TokenEvent
from kvroom.errors import KVRoomError
from kvroom.status import error_body, status_of

from .app import EngineServer, Exchange, ModelCard
from .naming import REQUEST_ID_HEADER, current
from .probe import Probe
from .replies import Body, Choice
from .schema import RoomEnd
from .tasks import merged

Steps = AsyncGenerator[tuple[Choice, TokenEvent], None]


class DecodeServer(EngineServer):
    """The HTTP server of a `DecodeEngine`."""

    role: ClassVar[str] = "decode"

    def __init__(self, engine: DecodeEngine, card: ModelCard, probe: Probe) -> None:
        super().__init__(engine, card, probe)
        self._engine = engine

    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """Answer with the generated text, as a stream or in one piece."""
        choices = [Choice(index, request.prompt_ids) for index, request in enumerate(exchange.requests)]
        async with aclosing(self._generate(exchange.requests, choices)) as steps:
            if not exchange.call.stream:
                async for _ in steps:
                    pass
                return web.json_response(exchange.reply.whole(choices))
            events, reply = _Events(exchange.http), exchange.reply
            try:
                async for choice, event in steps:
                    if len(choice.token_ids) == 1:
                        await events.send(reply.opening(choice))
                    await events.send(reply.chunk(choice, event.text, [event.token_id]))
                await events.send(reply.usage(choices))
            except KVRoomError as error:
                if not events.started:
                    raise
                body = error_body(status_of(error), str(error))
                body["error"]["request_id"] = current().request_id
                await events.send(body)
            return await events.end()

    def refused(self, legs: Sequence[RoomEnd], detail: str) -> None:
        """Tell the prefill sides, whose rooms may be waiting for an offer."""
        for leg in legs:
            if leg.address:
                self._engine.refuse(leg.address, leg.room, detail, trace=current())

    async def _generate(self, requests: list[Request], choices: list[Choice]) -> Steps:
        """Yield each token of any sequence with its choice, to which the token was added before."""
        streams = [self._noted(request, index) for index, request in enumerate(requests)]
        async with aclosing(merged(streams)) as events:
            async for index, event in events:
                self._produced += 1
                choice = choices[index]
                choice.extend(event.text, [event.token_id], event.finish_reason)
                if event.stats is not None:
                    choice.cached_tokens = event.stats.cached_tokens
                    choice.cost = self._recent.note(requests[index], index, event.stats)
                yield choice, event

    async def _noted(self, request: Request, index: int) -> AsyncGenerator[TokenEvent, None]:
        """Yield the tokens of one sequence. Note its failure, also that of a client that leaves."""
        failure: str | None = "cancelled: the client of the decode worker left"
        try:
            async with aclosing(self._engine.generate(request)) as events:
                async for event in events:
                    if event.stats is not None:
                        failure = None
                    yield event
        except KVRoomError as error:
            failure = str(error)
            raise
        finally:
            if failure is not None:
                self._recent.note_failure(request, index, failure)


class _Events:
    """A stream of server-sent events. The HTTP response starts with the first event."""

    def __init__(self, http: web.Request) -> None:
        self._http = http
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                REQUEST_ID_HEADER: current().request_id,
            }
        )

    @property
    def started(self) -> bool:
        return self._response.prepared

    async def send(self, body: Body | None) -> None:
        if body is not None:
            await self._write(msgspec.json.encode(body))

    async def end(self) -> web.StreamResponse:
        await self._write(b"[DONE]")
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._http)
        await self._response.write(b"data: " + data + b"\n\n")

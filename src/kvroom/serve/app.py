"""What prefill and decode workers share: routes, the way errors are told, and what a router asks about a worker.

A worker answers 400 for what the client did wrong (routers do not retry it), 503 for what another attempt in a new
room may cure, 500 where none can. There is no `/version`: a router that finds one takes the worker for vLLM and sends
no room.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import msgspec
from aiohttp import ClientConnectionResetError, web
from aiohttp.typedefs import Handler

from kvroom.core.phases import Phase
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import Request, check_request
from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError, LayoutError, PlanError
from kvroom.runtime.handles import ROOM_NUMBERS
from kvroom.serve.metrics import MetricsPage
from kvroom.serve.prompts import Prompts
from kvroom.serve.recent import Recent
from kvroom.serve.replies import Body, Reply, error_body
from kvroom.serve.schema import BadRequest, Call, Route, decode_json, parse
from kvroom.transports.checkup import examine

MAX_BODY_BYTES = 4 << 20
MAX_IDLE_WAIT_S = 60.0
MAX_SHOWN = 10_000
_RETRY_AFTER_S = "1"
_LOOK_EVERY_S = 0.01


@dataclass(frozen=True)
class ModelCard:
    """What a worker says about its model. `room_tokens`: prompt and answer of one sequence together, at most."""

    name: str
    path: str
    room_tokens: int
    max_running_requests: int


@dataclass(frozen=True)
class Exchange:
    """One valid call: where it came from, what it asks, how to say it back, one engine request per sequence."""

    http: web.Request
    call: Call
    reply: Reply
    requests: list[Request]


class Worker(ABC):
    """The HTTP face of one engine. Subclasses say how a call is answered and what is open."""

    role: ClassVar[str]

    def __init__(self, engine: PrefillEngine | DecodeEngine, card: ModelCard) -> None:
        self._served = engine
        self._card = card
        self._prompts = Prompts(engine.model.tokenizer, card.room_tokens)
        self._recent = Recent()
        self._metrics_page = MetricsPage(engine, self.role)

    @abstractmethod
    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """Answer a call that is valid. Cancelled when the client goes away: everything of the call then ends."""

    @abstractmethod
    def refused(self, requests: list[Request], cause: str) -> None:
        """A call that the other side may have accepted was refused here, before its rooms were touched."""

    def application(self) -> web.Application:
        """The aiohttp application. Its runner must be made with `handler_cancellation=True`."""
        app = web.Application(middlewares=[_errors_as_json], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/generate", self._route("generate")),
                web.post("/v1/completions", self._route("completions")),
                web.post("/v1/chat/completions", self._route("chat")),
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/server_info", self._server_info),
                web.get("/get_server_info", self._server_info),
                web.get("/model_info", self._model_info),
                web.get("/get_model_info", self._model_info),
                web.get("/rooms", self._rooms),
                web.get("/rooms/{number}", self._room),
                web.get("/metrics", self._metrics),
                web.get("/stats", self._stats),
                web.get("/doctor", self._doctor),
                web.post("/flush_cache", self._flush_cache),
            ]
        )
        return app

    def _route(self, route: Route) -> Handler:
        async def handle(http: web.Request) -> web.StreamResponse:
            body = decode_json(await http.read())
            request_id = uuid.uuid4().hex
            call = self._checked(route, body)
            requests = self._prompts.requests(call, request_id)
            self._check_engine(requests)
            return await self.answer(Exchange(http, call, Reply(call, self._card.name, request_id), requests))

        return handle

    def _checked(self, route: Route, body: Body) -> Call:
        call = parse(route, body)
        # SGLang's /generate names no model, and routers then write "unknown" or an empty name.
        if route != "generate" and call.model not in ("", self._card.name, self._card.path):
            raise BadRequest(f"model={call.model!r} is not served here; use {self._card.name!r}", "model")
        return call

    def _check_engine(self, requests: list[Request]) -> None:
        """What no worker can do, the other side refuses by itself; what only this one cannot, it has to be told."""
        model = self._served.model
        for request in requests:
            check_request(request, vocab_size=model.vocab_size, model_tokens=model.max_tokens)
        try:
            for request in requests:
                self._served.check(request)
        except InvalidRequest as fault:
            self.refused(requests, str(fault))
            raise

    async def _health(self, _: web.Request) -> web.StreamResponse:
        fault = self._served.load().fault
        return web.Response(text="ok") if fault is None else error_response(503, f"the engine has ended: {fault}")

    async def _models(self, _: web.Request) -> web.StreamResponse:
        card = {
            "id": self._card.name,
            "object": "model",
            "created": 0,
            "owned_by": "sglang",
            "root": self._card.path,
            "max_model_len": self._card.room_tokens,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def _server_info(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "model_path": self._card.path,
                "served_model_name": self._card.name,
                "disaggregation_mode": self.role,
                "max_running_requests": self._card.max_running_requests,
                "context_length": self._card.room_tokens,
                "transport": self._served.manager.transport.name,
                "transport_caution": self._served.manager.transport.caution(),
                "prefix_cache": self._served.prefix_cache,
            }
        )

    async def _model_info(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": self._card.path, "is_generation": True})

    async def _rooms(self, http: web.Request) -> web.StreamResponse:
        """What is open now.

        `?idle_within_s=N` waits until nothing is, `?phase=P&within_s=N` until a room is in phase P; 503 when that has
        not come after N seconds. `?oldest=N`: the N rooms that were opened first, and of the others their number
        (`kept`); this costs the same whatever is open, while everything else recounts every room.
        """
        if "oldest" in http.query:
            return web.json_response(await asyncio.to_thread(self._oldest, _count(http.query, "oldest")))
        if "phase" in http.query:
            return await self._rooms_in_phase(http.query["phase"], _seconds(http.query, "within_s"))
        status = 200
        if "idle_within_s" in http.query:
            try:
                await asyncio.to_thread(self._served.wait_idle, _seconds(http.query, "idle_within_s"))
            except TimeoutError:
                status = 503
        return web.json_response(await asyncio.to_thread(self._whats_open), status=status)

    async def _rooms_in_phase(self, phase: str, within_s: float) -> web.StreamResponse:
        if phase not in Phase.__members__:
            raise BadRequest(f"phase={phase!r}: give one of {', '.join(Phase.__members__)}", "phase")
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while True:
            body = await asyncio.to_thread(self._whats_open)
            if any(room["phase"] == phase for room in body["open"]):
                return web.json_response(body)
            if loop.time() >= end:
                return web.json_response(body, status=503)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _whats_open(self) -> Body:
        manager = self._served.manager
        counts: Body = msgspec.to_builtins(self._served.stats())
        return {**counts, "open": msgspec.to_builtins(manager.rooms()), "peers": manager.peers()}

    def _oldest(self, count: int) -> Body:
        manager = self._served.manager
        counts: Body = msgspec.to_builtins(self._served.load())
        kept = manager.metrics().census.kept
        return {**counts, "kept": kept, "open": msgspec.to_builtins(manager.rooms(count)), "peers": manager.peers()}

    async def _room(self, http: web.Request) -> web.StreamResponse:
        """One room: each side of it that is kept here, with its timeline. 404 when there is none, whatever it was."""
        number = _room_number(http.match_info["number"])
        views = await asyncio.to_thread(self._served.manager.room, number)
        if not views:
            return error_response(
                404,
                f"room {number} is not open on this worker: it has not come yet or has ended, and nothing is remembered"
                " of ended rooms; /metrics counts them, the log of the worker says why they failed",
                "room",
            )
        return web.json_response({"room": number, "views": msgspec.to_builtins(views)})

    async def _metrics(self, http: web.Request) -> web.StreamResponse:
        """Every count of this worker for Prometheus."""
        page, content_type = await asyncio.to_thread(self._metrics_page.render, http.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": content_type})

    async def _stats(self, _: web.Request) -> web.StreamResponse:
        """The costs of the last hand-offs."""
        return web.json_response(self._recent.body())

    async def _flush_cache(self, _: web.Request) -> web.StreamResponse:
        """Forget every cached page that no request uses; 503 if the engine does not come to it."""
        try:
            pages = await asyncio.wait_for(asyncio.wrap_future(self._served.drop_cache()), MAX_IDLE_WAIT_S)
        except asyncio.TimeoutError:
            return error_response(503, f"the engine has not dropped its cache within {MAX_IDLE_WAIT_S:g} s")
        return web.json_response({"dropped_pages": pages})

    async def _doctor(self, _: web.Request) -> web.StreamResponse:
        """What `kvroom doctor --json` would print if it ran in this process."""
        report = await asyncio.to_thread(examine)
        return web.Response(body=msgspec.json.encode(report), content_type="application/json")


def _room_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(ROOM_NUMBERS)) or int(text) >= ROOM_NUMBERS:
        raise BadRequest(f"{text[:40]!r} is no room number: give a whole number of at least 0, below 2**63", "room")
    return int(text)


def _count(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:10]) <= MAX_SHOWN:
        raise BadRequest(f"{name}={text[:40]!r}: give a whole number in [1, {MAX_SHOWN}]", name)
    return int(text)


def _seconds(query: Mapping[str, str], name: str) -> float:
    text = query.get(name, "")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= MAX_IDLE_WAIT_S:
        raise BadRequest(f"{name}={text!r}: give seconds in (0, {MAX_IDLE_WAIT_S:g}]", name)
    return value


def error_response(status: int, message: str, param: str | None = None) -> web.Response:
    """An error as a response.

    It is sent in chunks: smg wraps the body of a decode worker's error in an event of its own but keeps our
    Content-Length, which would cut the message short.
    """
    response = web.json_response(error_body(status, message, param), status=status)
    response.enable_chunked_encoding()
    if status == web.HTTPServiceUnavailable.status_code:
        response.headers["Retry-After"] = _RETRY_AFTER_S
    return response


def status_of(fault: KVRoomError) -> int:
    """400: the client's fault. 500: it will fail each time. 503: another attempt, in a new room, may succeed."""
    if isinstance(fault, InvalidRequest):
        return 400
    if isinstance(fault, ConfigurationError | LayoutError | PlanError):
        return 500
    return 503


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except KVRoomError as fault:
        return error_response(status_of(fault), str(fault), getattr(fault, "param", None))
    except web.HTTPRequestEntityTooLarge:
        return error_response(413, f"the body is larger than {MAX_BODY_BYTES} bytes; shorten the prompt")
    except ClientConnectionResetError:
        # The client went away while we wrote; the handler has cleaned up and nobody reads this.
        return web.Response(status=499)
    except web.HTTPException as fault:
        if fault.status < 400:
            raise
        return error_response(fault.status, f"{request.method} {request.path}: {fault.reason}")

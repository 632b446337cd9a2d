"""The routes and errors that prefill and decode workers share.

There are two applications. The one for clients and routers has no route that shows or changes requests of others. Such
routes are for the operator, in the application for the admin address.

A worker answers 400 for a client's mistake (routers do not retry it), 503 if another attempt in a new room may succeed,
and 500 otherwise. There is no `/version`: a router that finds one assumes that the worker is vLLM, and sends no room.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import msgspec
from aiohttp import ClientConnectionResetError, web
from aiohttp.typedefs import Handler

from kvroom import RequestTrace
from kvroom.doctor import examine
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import Request, check_request
from kvroom.errors import InvalidRequest, KVRoomError
from kvroom.network import bears
from kvroom.status import MAX_WAIT_S, Admission, BadRequest, RoomsWindow, error_response, errors_as_json

from .metrics import worker_page
from .naming import current, named, named_by_body
from .probe import Probe
from .prompts import Prompts
from .recent import Recent
from .replies import Body, ReplyBuilder
from .schema import Call, RoomEnd, Route, decode_json, named_legs, parse

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
_INLINE_BYTES = 16 << 10
"""Size up to which a body is tokenised in the event loop: that takes less time than a switch to a thread."""
_TOKENISERS = 2
_OPEN = frozenset(("/health", "/health_generate", "/server_info", "/get_server_info", "/model_info", "/get_model_info"))
"""The paths that need no API key."""
_NO_KEY = "invalid_api_key"  # OpenAI's code
_NO_MODEL = "model_not_found"  # likewise


@dataclass(frozen=True)
class ModelCard:
    """A worker's description of its model. `room_tokens` limits prompt plus answer of one sequence."""

    name: str
    path: str
    room_tokens: int
    max_running_requests: int


@dataclass(frozen=True)
class Exchange:
    """One valid call: the HTTP request, its parsed body, the builder of its reply, one engine request per sequence."""

    http: web.Request
    call: Call
    reply: ReplyBuilder
    requests: list[Request]


class EngineServer(ABC):
    """The HTTP server of one engine. Subclasses implement `answer` and `refused` for their role."""

    role: ClassVar[str]

    def __init__(self, engine: PrefillEngine | DecodeEngine, card: ModelCard, probe: Probe) -> None:
        self._served = engine
        self._card = card
        self._probe = probe
        self._produced = 0  # tokens generated, or prompts handed over, of requests
        self._prompts = Prompts(engine.model.tokenizer, card.room_tokens, engine.model.eos_ids)
        self._tokenisers = ThreadPoolExecutor(_TOKENISERS, "kvroom-tokenise")
        self._recent = Recent()
        self._metrics_page = worker_page(engine, self.role)

    @abstractmethod
    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        """Answer a valid call. It is cancelled when the client disconnects; all its sequences must end then."""

    @abstractmethod
    def refused(self, legs: Sequence[RoomEnd], detail: str) -> None:
        """Tell the other side of each leg that this worker refused the call before it opened a room."""

    def application(self, admin_url: str, api_keys: Sequence[bytes] = ()) -> web.Application:
        """Return the aiohttp application for clients and routers. Its runner must have `handler_cancellation=True`.

        `admin_url` is the URL of the operator's application, which `/server_info` reports. If there are `api_keys`, all
        routes except those for supervisors and routers require one of them.
        """

        @web.middleware
        async def require_key(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Refuse a request without a valid key before its body is read."""
            is_no_route = request.match_info.http_exception is not None
            if is_no_route or request.path in _OPEN or bears(request.headers.getall("Authorization", []), api_keys):
                return await handler(request)
            response = error_response(401, "missing or invalid API key: send `Authorization: Bearer KEY`", code=_NO_KEY)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response

        keys = [require_key] if api_keys else []
        middlewares = [named, errors_as_json, *keys, _explain_too_large]
        app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)

        async def end_tokenisers(_: web.Application) -> None:
            self._tokenisers.shutdown(wait=False, cancel_futures=True)

        app.on_cleanup.append(end_tokenisers)
        server_info = partial(self._server_info, admin_url)
        app.add_routes(
            [
                web.post("/generate", self._route("generate")),
                web.post("/v1/completions", self._route("completions")),
                web.post("/v1/chat/completions", self._route("chat")),
                web.get("/health", self._health),
                web.get("/health_generate", self._health_generate),
                web.get("/v1/models", self._models),
                web.get("/server_info", server_info),
                web.get("/get_server_info", server_info),
                web.get("/model_info", self._model_info),
                web.get("/get_model_info", self._model_info),
            ]
        )
        return app

    def admin_application(self, admission: Admission) -> web.Application:
        """Return the aiohttp application for the operator. Its runner needs the same option as `application`'s."""

        def load() -> Body:
            counts: Body = msgspec.to_builtins(self._served.load())
            return counts

        def is_idle_within(timeout_s: float) -> bool:
            try:
                self._served.wait_idle(timeout_s)
            except TimeoutError:
                return False
            return True

        async def metrics(http: web.Request) -> web.StreamResponse:
            page, content_type = await asyncio.to_thread(self._metrics_page.render, http.headers.get("Accept", ""))
            return web.Response(body=page, headers={"Content-Type": content_type})

        async def stats(_: web.Request) -> web.StreamResponse:
            return web.json_response({**self._recent.body(), "now": time.time()})

        async def doctor(_: web.Request) -> web.StreamResponse:
            """Answer as `kvroom doctor --json` would print in this process."""
            report = await asyncio.to_thread(examine, self._served.manager.trusted_fabric)
            return web.Response(body=msgspec.json.encode(report), content_type="application/json")

        async def flush_cache(_: web.Request) -> web.StreamResponse:
            """Free every cached page that no request uses. Answer 503 if the engine does not do so in time."""
            try:
                pages = await asyncio.wait_for(asyncio.wrap_future(self._served.drop_cache()), MAX_WAIT_S)
            except asyncio.TimeoutError:
                return error_response(503, f"timed out: the engine did not drop its cache within {MAX_WAIT_S:g} s")
            return web.json_response({"dropped_pages": pages})

        app = web.Application(middlewares=[errors_as_json, admission.middleware()])
        app.add_routes(RoomsWindow(self._served.manager, load, is_idle_within).routes())
        app.add_routes([web.get("/metrics", metrics), web.get("/stats", stats), web.get("/doctor", doctor)])
        app.add_routes([web.post("/flush_cache", flush_cache)])
        return app

    def _route(self, route: Route) -> Handler:
        async def handle(http: web.Request) -> web.StreamResponse:
            data = await http.read()
            body = decode_json(data)
            trace = named_by_body(http.headers, body)
            try:
                call = parse(route, body)
                # SGLang's /generate names no model, and routers then write "unknown", null or an empty name.
                if route != "generate" and call.model not in ("", self._card.name, self._card.path):
                    shown = f"model={call.model[:200]!r}"
                    raise BadRequest(
                        f"{shown} is not served here; use {self._card.name!r}", "model", status=404, code=_NO_MODEL
                    )
                if len(data) <= _INLINE_BYTES:
                    requests = self._requests(call, trace)
                else:
                    loop = asyncio.get_running_loop()
                    requests = await loop.run_in_executor(self._tokenisers, self._requests, call, trace)
            except InvalidRequest as error:
                self._tell_refused(named_legs(route, body), str(error))
                raise
            except asyncio.CancelledError:  # during tokenisation; after it, the engine informs the other side
                self._tell_refused(named_legs(route, body), f"cancelled: the client of the {self.role} worker left")
                raise
            reply = ReplyBuilder(call, self._card.name, uuid.uuid4().hex)
            return await self.answer(Exchange(http, call, reply, requests))

        return self._logged(handle)

    def _logged(self, handle: Handler) -> Handler:
        """Return a handler that also logs the end of each request: a success or a refusal at DEBUG, others at INFO."""

        async def handle_and_log(http: web.Request) -> web.StreamResponse:
            started = time.monotonic()
            level, end = logging.INFO, "failed"
            try:
                response = await handle(http)
                level, end = logging.DEBUG, f"was answered with {response.status}"
                return response
            except (asyncio.CancelledError, ClientConnectionResetError):
                end = "was cancelled: the client left"
                raise
            except KVRoomError as error:
                if isinstance(error, InvalidRequest):  # a stranger can send as many of these as it likes
                    level = logging.DEBUG
                end = f"failed: {error}"
                raise
            finally:
                if log.isEnabledFor(level):
                    took_s = time.monotonic() - started
                    extra = current()._asdict()
                    log.log(level, "%s %s %s after %.3f s", http.method, http.path, end, took_s, extra=extra)

        return handle_and_log

    def _requests(self, call: Call, trace: RequestTrace) -> list[Request]:
        """Return the checked engine requests of a call. Runs in the event loop or, for a large body, in a thread."""
        requests = self._prompts.requests(call, trace)
        model = self._served.model
        for request in requests:
            check_request(request, vocab_size=model.vocab_size, model_tokens=model.max_tokens)
            self._served.check(request)
        return requests

    def _tell_refused(self, legs: Sequence[RoomEnd], detail: str) -> None:
        """Tell the other side about a refusal, unless `max_waiting` refused rooms are kept for this already.

        Usually the other side refuses the same body for the same reason. But the router may have sent it a different
        body, or it may have other limits or another version. Then it would wait for this side until its deadline.
        """
        if self._served.load().parting < self._served.options.max_waiting:
            self.refused(legs, detail)

    async def _health(self, _: web.Request) -> web.StreamResponse:
        error = self._served.load().error
        return web.Response(text="ok") if error is None else error_response(503, f"the engine has ended: {error}")

    async def _health_generate(self, http: web.Request) -> web.StreamResponse:
        """Answer 200 if the engine handles one token in time: see `kvroom.serve.probe`."""
        try:
            await self._probe.check(lambda: self._produced)
        except KVRoomError as error:
            return error_response(503, f"the engine of this worker failed its health probe: {error}")
        return await self._health(http)

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

    async def _server_info(self, admin_url: str, _: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "model_path": self._card.path,
                "served_model_name": self._card.name,
                "disaggregation_mode": self.role,
                "max_running_requests": self._card.max_running_requests,
                "context_length": self._card.room_tokens,
                "transport": self._served.manager.transport.name,
                "transport_caution": self._served.manager.transport.warning(),
                "prefix_cache": self._served.prefix_cache,
                "admin_url": admin_url,
            }
        )

    async def _model_info(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": self._card.path, "is_generation": True})


@web.middleware
async def _explain_too_large(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        return error_response(413, f"the body is larger than {MAX_BODY_BYTES} bytes; shorten the prompt")

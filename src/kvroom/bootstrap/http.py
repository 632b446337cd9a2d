"""The directory over HTTP: routes to methods, errors to statuses, nothing else.

    PUT  /route                register or refresh a rank
    DELETE /route              end the registration of a rank, whose body is the same (ours)
    GET  /route                all live ranks; with the four rank parameters one rank, or with all -1 the server
    POST /register_dp_rank     leave a room's data-parallel rank
    POST /register_dp_ranks    leave those of many rooms
    POST /query_dp_ranks       ask for those of many rooms, and wait for the first one to be known if the query says so
    GET  /health               never signed

With a secret every other request must be signed, and its answer is signed, too (`kvroom.bootstrap.sign`). Refusals of a
wrong signature, of a body too large to be checked, and at the limit of open files are not signed. Every refusal is
`{"error": "<one sentence>"}` with 400 (malformed), 401 (not signed right), 404 (no such rank), 409 (another engine
is registered here), 413 (too large) or 503 (ranks still missing, or a limit is full).

A rank that has a rival (see `directory`) is kept out only if the rival is alive, which is asked of it at once. If it
does not answer, the refusal says `"retry": true`: the newcomer asks again until the rival's lease has decided. The
answer to a rank that refreshes says `{"refused": "host:port"}` if another engine wanted its place meanwhile, else OK.

A query that waits is in memory for that time only: it ends with its answer, and at once when its asker hangs up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import msgspec
from aiohttp import web

from kvroom.errors import AuthenticationError, BootstrapError, ConfigurationError, KVRoomError, LimitExceeded
from kvroom.listening.repeats import Repeats
from kvroom.plan import Place
from kvroom.wire.address import HostPort, check_port, listening_at, read_listen_host
from kvroom.wire.auth import require_secret
from kvroom.wire.frames import UNDECODABLE

from . import sign
from .alive import is_alive
from .directory import (
    Contradiction,
    Directory,
    DpRankHint,
    DpRankHints,
    DpRankQuery,
    NotReady,
    PlaceHeld,
    RankInfo,
    RouteList,
    Undecided,
)
from .site import http_site
from .threads import ServerThread

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 10
SHUTDOWN_S = 1.0
"""Seconds that requests get to end by themselves."""
_ASKED_AT_ONCE = 64
"""Ranks of an earlier run that are asked whether they are alive."""
MAX_WAITING = 512
"""Queries that wait at once; a decode rank has one."""
_ROUTE_PARAMETERS = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
_ALL = Place(-1, -1, -1, -1)
_PATHS = ("/route", "/register_dp_rank", "/register_dp_ranks", "/query_dp_ranks")
_STATUS: tuple[tuple[type[KVRoomError], int], ...] = (
    (AuthenticationError, 401),
    (Contradiction, 409),
    (PlaceHeld, 409),
    (NotReady, 503),
    (LimitExceeded, 503),
    (BootstrapError, 404),
)
"""The first class that fits decides."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_T = TypeVar("_T")


class _Malformed(KVRoomError):
    """A request that says nothing sensible: 400."""


@dataclass(eq=False)
class _Waiter:
    """A query of which no room is known yet."""

    asked: frozenset[int]
    known: asyncio.Future[None]


class KVBootstrapServer:
    """Serves one directory. Run it inside a loop (`await serve()`, `await aclose()`, `async with`) or with a thread of
    its own (`start()`, `close()`, `with`). `port` 0 takes any free one. Both ways `ConfigurationError` says why it
    cannot listen, and then nothing is open. At most `max_waiting` queries wait at once.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        secret: bytes = b"",
        directory: Directory | None = None,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        require_secret(host, secret)
        check_port(port, "the bootstrap directory")
        self._listen = HostPort(read_listen_host(host), port)
        self._secret = secret
        self._directory = Directory() if directory is None else directory
        self._max_waiting = max_waiting
        self._waiters: set[_Waiter] = set()
        self._log = Repeats(logger)  # of what a stranger can repeat as often as it likes
        self._site: AsyncExitStack | None = None
        self._address: str | None = None
        self._thread = ServerThread("kvroom-bootstrap", self._listen, self._serving)

    @property
    def address(self) -> str:
        """`host:port` that it listens on. Defined once it runs.

        It is the `bootstrap_addr` of the decode side, unless it is every interface (`0.0.0.0`, `::`): then that has the
        host by which the decode side reaches this machine.
        """
        if self._address is None:
            raise ConfigurationError("the bootstrap server has no address before it is started")
        return self._address

    # in a loop of the caller's

    async def serve(self) -> str:
        """Listen from now on, on the running loop; returns the address."""
        if self._site is not None:
            raise ConfigurationError(f"the bootstrap server runs already, on {self.address}")
        app = web.Application(middlewares=[_say_errors, self._sign], client_max_size=MAX_BODY_BYTES)
        app.router.add_put("/route", self._put_route)
        app.router.add_delete("/route", self._delete_route)
        app.router.add_get("/route", self._get_route)
        app.router.add_post("/register_dp_rank", self._register_dp_rank)
        app.router.add_post("/register_dp_ranks", self._register_dp_ranks)
        app.router.add_post("/query_dp_ranks", self._query_dp_ranks)
        app.router.add_get("/health", _health)
        site = AsyncExitStack()
        port = await site.enter_async_context(http_site(app, self._listen, shutdown_s=SHUTDOWN_S))
        self._site = site
        self._address = listening_at(self._listen.host, port)
        return self._address

    async def aclose(self) -> None:
        """Stop listening, answer the queries that wait, close every connection. Idempotent."""
        site, self._site, self._address = self._site, None, None
        if site is not None:
            for waiter in self._waiters:
                _wake(waiter)
            await site.aclose()

    async def __aenter__(self) -> KVBootstrapServer:
        await self.serve()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # with a thread of its own

    def start(self) -> str:
        """Listen from now on, on a loop in a new thread; returns the address once it accepts."""
        if self._thread.running:
            raise ConfigurationError(f"the bootstrap server runs already, on {self.address}")
        return self._thread.start()

    def close(self) -> None:
        """End the thread that `start` began. Idempotent."""
        self._thread.close()

    def __enter__(self) -> KVBootstrapServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[str]:
        try:
            yield await self.serve()
        finally:
            await self.aclose()

    # routes

    async def _put_route(self, request: web.Request) -> web.Response:
        rank = await _body(request, RankInfo)
        # Rivals that are gone are forgotten. `Undecided` if none is alive, and not all are known to be gone.
        while rivals := self._directory.rivals(rank, time.monotonic())[:_ASKED_AT_ONCE]:
            answers = await asyncio.gather(*map(is_alive, rivals))
            for rival, alive in zip(rivals, answers, strict=True):
                if alive is False:
                    self._directory.remove(rival)
            if any(answers):
                break
            if None in answers:
                raise self._directory.undecided(rank, rivals[answers.index(None)], time.monotonic())
        refused = self._directory.register(rank, time.monotonic())
        return _json({"refused": refused}) if refused else web.Response(text="OK")

    async def _delete_route(self, request: web.Request) -> web.Response:
        self._directory.remove(await _body(request, RankInfo))
        return web.Response(text="OK")

    async def _get_route(self, request: web.Request) -> web.Response:
        now_s = time.monotonic()
        if not request.query:
            return _json(RouteList(self._directory.ranks(now_s)))
        ranks = []
        for name in _ROUTE_PARAMETERS:
            text = request.query.get(name)
            if text is None:
                raise _Malformed(f"GET /route: {name} is missing: give all of {', '.join(_ROUTE_PARAMETERS)}, or none")
            try:
                ranks.append(int(text))
            except ValueError:
                raise _Malformed(f"GET /route: {name} is {text!r}, must be a rank, or -1 in all four") from None
        place = Place(*ranks)
        if place == _ALL:
            return _json(self._directory.server(now_s))
        return _json(self._directory.find(place, now_s))

    async def _register_dp_rank(self, request: web.Request) -> web.Response:
        hint = await _body(request, DpRankHint)
        self._leave({hint.bootstrap_room: hint.dp_rank})
        return web.Response(text="OK")

    async def _register_dp_ranks(self, request: web.Request) -> web.Response:
        self._leave((await _body(request, DpRankHints)).dp_ranks)
        return web.Response(text="OK")

    async def _query_dp_ranks(self, request: web.Request) -> web.Response:
        query = await _body(request, DpRankQuery)
        found = self._directory.query_dp_ranks(query.bootstrap_rooms, time.monotonic())
        if not found and query.wait_s:
            if len(self._waiters) >= self._max_waiting:
                raise LimitExceeded(f"as many queries as may wait here do ({self._max_waiting}): ask again later")
            waiter = _Waiter(frozenset(query.bootstrap_rooms), asyncio.get_running_loop().create_future())
            self._waiters.add(waiter)
            try:  # until one of these rooms has a hint, the time is over, or the server closes
                await asyncio.wait({waiter.known}, timeout=query.wait_s)
            finally:
                self._waiters.discard(waiter)
            found = self._directory.query_dp_ranks(query.bootstrap_rooms, time.monotonic())
        return _json({str(room): dp_rank for room, dp_rank in found.items()})

    def _leave(self, dp_ranks: Mapping[int, int]) -> None:
        self._directory.register_dp_ranks(dp_ranks, time.monotonic())
        now_known = set(dp_ranks)
        for waiter in self._waiters:
            if not waiter.asked.isdisjoint(now_known):
                _wake(waiter)

    @web.middleware
    async def _sign(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Answer signed requests only, and sign the answers, refusals as well."""
        if not self._secret or request.path == "/health":
            return await handler(request)
        body = await request.read()
        try:
            signed = sign.check(self._secret, request.headers.get(sign.HEADER), request.method, request.raw_path, body)
        except AuthenticationError as error:
            self._log_refusal(request, error)
            raise

        async def answer_in_time(request: web.Request) -> web.StreamResponse:
            try:
                sign.check_time(signed, time.time())
            except AuthenticationError as error:
                self._log_refusal(request, error)
                raise
            return await handler(request)

        response = await _say_errors(request, answer_in_time)
        assert isinstance(response, web.Response)
        answer = response.body
        assert isinstance(answer, bytes)  # all of our routes answer so
        response.headers[sign.ANSWER_HEADER] = sign.sign_answer(self._secret, signed.nonce, response.status, answer)
        return response

    def _log_refusal(self, request: web.Request, error: AuthenticationError) -> None:
        # Its sender may be a decode worker whose room waits here. It has proven nothing, so no room may end by its
        # word, and it does not learn which ranks to tell: this line is what the prefill side can see of it.
        self._log.warning(
            "refused %s %s of %s: %s; if that is a decode worker, its rooms time out here",
            request.method,
            request.path if request.path in _PATHS else "(no path of ours)",
            request.remote,
            error,
            extra={"peer": str(request.remote)},
        )


@web.middleware
async def _say_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        detail = f"the body is over {MAX_BODY_BYTES} bytes" if error.status == 413 else error.reason
        return _error(error.status, f"{request.method} {request.path}: {detail}")
    except _Malformed as error:
        return _error(400, str(error))
    except Undecided as error:
        return _json({"error": str(error), "retry": True}, 503)
    except (AuthenticationError, BootstrapError, LimitExceeded) as error:
        return _error(next(status for kind, status in _STATUS if isinstance(error, kind)), str(error))


def _wake(waiter: _Waiter) -> None:
    if not waiter.known.done():
        waiter.known.set_result(None)


async def _health(request: web.Request) -> web.Response:  # noqa: ARG001 - aiohttp's signature
    return web.Response(text="OK")


async def _body(request: web.Request, kind: type[_T]) -> _T:
    """The body as `kind`. Numbers may be strings, as SGLang's server allows; everything else is strict."""
    try:
        return msgspec.json.decode(await request.read(), type=kind, strict=False)
    except UNDECODABLE as error:
        raise _Malformed(f"{request.method} {request.path}: {error}") from None


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", status=status)


def _error(status: int, sentence: str) -> web.Response:
    return _json({"error": sentence}, status)

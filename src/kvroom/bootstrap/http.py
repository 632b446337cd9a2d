"""The directory over HTTP: this module maps routes to methods and errors to statuses.

    PUT  /route                register or refresh a rank
    DELETE /route              end the registration of a rank, with the same body (kvroom's addition)
    GET  /route                all live ranks; with the four rank parameters one rank, or with all -1 the server
    POST /register_dp_rank     store the data-parallel rank of a room
    POST /register_dp_ranks    store those of many rooms
    POST /query_dp_ranks       return those of many rooms; with `wait_s`, wait until the first one is known
    GET  /health               never signed

With a secret, every request except `/health` must be signed, and its answer is signed too (`kvroom.bootstrap.sign`).
Three refusals are unsigned: of a wrong signature, of a body too large to be checked, and at the limit of open files.
Every refusal is `{"error": "<one sentence>"}` with 400 (malformed), 401 (no valid signature), 404 (no rank at this
place), 409 (another engine is registered here), 413 (too large) or 503 (ranks still missing, or a limit is reached).

A rank with a rival (see `directory`) is refused only if the rival is alive, which the server checks immediately. If the
rival does not answer, the refusal has `"retry": true`, and the new rank retries until the rival's lease ends. The
answer to a refresh is `{"refused": "host:port"}` if another engine was refused the place since the last refresh, and OK
otherwise.

A waiting query is kept in memory only while it waits. It ends with its answer, or as soon as its client disconnects.
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
"""Seconds that open requests get to end before they are cancelled."""
_MAX_PROBES = 64
"""Rivals that are checked for being alive at the same time."""
MAX_WAITING = 512
"""Queries that may wait at the same time. A decode rank has at most one."""
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
"""The first class that matches an error determines its status."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_T = TypeVar("_T")


class _Malformed(KVRoomError):
    """An invalid request, answered with 400."""


@dataclass(eq=False)
class _Waiter:
    """A waiting query: none of its `rooms` has a hint yet. `known` completes when one has."""

    rooms: frozenset[int]
    known: asyncio.Future[None]


class KVBootstrapServer:
    """The HTTP server of one bootstrap directory.

    It runs either in the caller's event loop (`await serve()` and `await aclose()`, or `async with`) or in its own
    thread (`start()` and `close()`, or `with`).

    Args:
        host: The address to listen on.
        port: The port to listen on; 0 takes any free one.
        secret: The shared secret. It is required if `host` is not a loopback address.
        directory: The entries to serve; by default an empty directory.
        max_waiting: The number of queries that may wait at the same time. One more is answered 503.

    Raises:
        ConfigurationError: The host or the port is invalid, or the secret is missing. `serve` and `start` also raise it
            if the server cannot listen; nothing is open then.
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
        self._log = Repeats(logger)  # limits the lines that a stranger can cause
        self._site: AsyncExitStack | None = None
        self._address: str | None = None
        self._thread = ServerThread("kvroom-bootstrap", self._listen, self._serving)

    @property
    def address(self) -> str:
        """The "host:port" that the server listens on. Raises `ConfigurationError` while the server does not run.

        Pass it to the decode side as `bootstrap_addr`. If the host is a wildcard (`0.0.0.0`, `::`), replace it there by
        a host under which the decode side reaches this machine.
        """
        if self._address is None:
            raise ConfigurationError("the bootstrap server has no address while it does not run: start it first")
        return self._address

    # in the caller's event loop

    async def serve(self) -> str:
        """Start the server on the running event loop.

        Returns:
            The `address`, on which the server accepts connections now.

        Raises:
            ConfigurationError: The server cannot listen there, or runs already. Nothing was opened.
        """
        if self._site is not None:
            raise ConfigurationError(f"the bootstrap server already runs on {self.address}: close it first")
        app = web.Application(middlewares=[_errors_as_answers, self._sign], client_max_size=MAX_BODY_BYTES)
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
        """Stop listening, answer the waiting queries, and close every connection. Idempotent."""
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

    # in its own thread

    def start(self) -> str:
        """Start the server on an event loop in a new thread.

        Returns:
            The `address`, on which the server accepts connections now.

        Raises:
            ConfigurationError: The server cannot listen there, or runs already. No new thread is left.
        """
        if self._thread.running:
            raise ConfigurationError(f"the bootstrap server already runs on {self.address}: close it first")
        return self._thread.start()

    def close(self) -> None:
        """Stop the server as `aclose` does, and end the thread that `start` began. Idempotent."""
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
        # Remove the rivals that are gone. If one is alive, `register` raises the refusal. If none is known to be alive
        # and one does not answer, the rank has to wait for the end of its lease.
        while rivals := self._directory.rivals(rank, time.monotonic())[:_MAX_PROBES]:
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
                raise _Malformed(f"GET /route: {name} is {text!r}: give a rank, or -1 for all four") from None
        place = Place(*ranks)
        if place == _ALL:
            return _json(self._directory.server(now_s))
        return _json(self._directory.find(place, now_s))

    async def _register_dp_rank(self, request: web.Request) -> web.Response:
        hint = await _body(request, DpRankHint)
        self._store_hints({hint.bootstrap_room: hint.dp_rank})
        return web.Response(text="OK")

    async def _register_dp_ranks(self, request: web.Request) -> web.Response:
        self._store_hints((await _body(request, DpRankHints)).dp_ranks)
        return web.Response(text="OK")

    async def _query_dp_ranks(self, request: web.Request) -> web.Response:
        query = await _body(request, DpRankQuery)
        found = self._directory.query_dp_ranks(query.bootstrap_rooms, time.monotonic())
        if not found and query.wait_s:
            if len(self._waiters) >= self._max_waiting:
                raise LimitExceeded(f"too many waiting queries (limit {self._max_waiting}): retry later")
            waiter = _Waiter(frozenset(query.bootstrap_rooms), asyncio.get_running_loop().create_future())
            self._waiters.add(waiter)
            try:  # wait until one of these rooms has a hint, the time is over, or the server closes
                await asyncio.wait({waiter.known}, timeout=query.wait_s)
            finally:
                self._waiters.discard(waiter)
            found = self._directory.query_dp_ranks(query.bootstrap_rooms, time.monotonic())
        return _json({str(room): dp_rank for room, dp_rank in found.items()})

    def _store_hints(self, dp_ranks: Mapping[int, int]) -> None:
        """Store hints, and answer the queries that wait for one of these rooms."""
        self._directory.register_dp_ranks(dp_ranks, time.monotonic())
        now_known = set(dp_ranks)
        for waiter in self._waiters:
            if not waiter.rooms.isdisjoint(now_known):
                _wake(waiter)

    @web.middleware
    async def _sign(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse requests without a valid signature, and sign all other answers, including refusals."""
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

        response = await _errors_as_answers(request, answer_in_time)
        assert isinstance(response, web.Response)
        answer = response.body
        assert isinstance(answer, bytes)  # every route of this module returns bytes
        response.headers[sign.ANSWER_HEADER] = sign.sign_answer(self._secret, signed.nonce, response.status, answer)
        return response

    def _log_refusal(self, request: web.Request, error: AuthenticationError) -> None:
        # The sender may be a decode worker whose room waits on this prefill side. Without proof of the secret it must
        # not end a room, and it gets no list of ranks to which it could send an abort. So this log line is the only
        # sign on the prefill side of the reason why such a room times out.
        self._log.warning(
            "refused %s %s from %s: %s; if this is a decode worker, its rooms will time out here",
            request.method,
            request.path if request.path in _PATHS else "(unknown path)",
            request.remote,
            error,
            extra={"peer": str(request.remote)},
        )


@web.middleware
async def _errors_as_answers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        detail = f"the body is larger than {MAX_BODY_BYTES} bytes" if error.status == 413 else error.reason
        answer = _error(error.status, f"{request.method} {request.path}: {detail}")
        if "Allow" in error.headers:  # of a wrong method (RFC 9110, 15.5.6)
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
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
    """Return the body as `kind`. Numbers may be strings, as in SGLang's server. Everything else is strict."""
    try:
        return msgspec.json.decode(await request.read(), type=kind, strict=False)
    except UNDECODABLE as error:
        raise _Malformed(f"{request.method} {request.path}: {error}") from None


def _json(value: object, status: int = 200) -> web.Response:
    headers = {"Retry-After": "1"} if status == web.HTTPServiceUnavailable.status_code else {}
    body = msgspec.json.encode(value)
    return web.Response(body=body, content_type="application/json", status=status, headers=headers)


def _error(status: int, sentence: str) -> web.Response:
    return _json({"error": sentence}, status)

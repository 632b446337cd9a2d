"""The probe behind `/health_generate`: it hands one token over in a new room, with a partner engine in this process.

A worker does not use its real partners for this. A prefill worker has no address of a decode worker before one comes to
a room. A decode worker would have to send an HTTP request to a prefill worker, whose URL only the router has. And a
worker whose partner has failed is healthy itself: a failed probe would only cause a useless restart.

The partner is therefore an engine of the other role in the same process, with the same weights and the smallest pool.
It uses a directory, a link and the worker's transport like any partner, so a probe covers all parts that a request
uses, except for the HTTP body.

The partner starts with the first probe and runs until a probe fails or the worker ends. A probe leaves nothing in
either engine.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

import msgspec

from kvroom import ROOM_NUMBERS, KVBootstrapServer
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.loop import EngineLoop, EngineT, OpenManager
from kvroom.engine.options import EngineOptions
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import Request
from kvroom.errors import KVRoomError, LimitExceeded

from .tasks import together

WITHIN_S = 20.0
"""Seconds that a probe may take; the same as SGLang's SGLANG_HEALTH_CHECK_TIMEOUT."""
_POLL_S = 0.25
_SALT = "kvroom health"

Ask = Callable[[], Awaitable[None]]
"""A function that hands one token over in a new room. Raises `KVRoomError`."""


class Unhealthy(KVRoomError):
    """No token came through within the time limit."""


class Probe:
    """The health probe of one engine. `partner` starts the other side.

    In a busy engine, a probe may wait behind requests. The engine is healthy then if those requests make progress.
    """

    def __init__(
        self,
        engine: EngineLoop,
        partner: Callable[[], AbstractAsyncContextManager[Ask]],
        *,
        within_s: float = WITHIN_S,
    ) -> None:
        self._engine = engine
        self._partner = partner
        self._within_s = within_s
        self._open = AsyncExitStack()
        self._ask: Ask | None = None
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Probe:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Cancel a running probe, then end the partner."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._drop_partner()

    async def check(self, produced: Callable[[], int]) -> None:
        """Return when a token was handed over; raise `KVRoomError` with the reason if that fails or times out.

        `produced()` returns the number of tokens or prompts that the worker has finished so far. Concurrent callers
        share one probe.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run(produced))
        await asyncio.shield(self._running)

    async def _run(self, produced: Callable[[], int]) -> None:
        before = produced()
        try:
            if not await self._token_arrived(lambda: produced() > before):
                load = self._engine.load()
                here = f"{load.waiting} requests wait, {load.running} run"
                raise Unhealthy(f"timed out: no token came through within {self._within_s:g} s; {here}")
        except KVRoomError:
            await self._drop_partner()  # the cause may be in the partner, so the next probe starts a new one
            raise

    async def _token_arrived(self, progressed: Callable[[], bool]) -> bool:
        """Return True when the token has arrived or the requests before it make progress, False at the time limit."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._within_s
        asking: asyncio.Future[None] | None = None

        async def ask() -> None:
            if self._ask is None:
                self._ask = await self._open.enter_async_context(self._partner())
            await self._ask()

        try:
            while loop.time() < end:
                asking = asking or asyncio.ensure_future(ask())
                await asyncio.wait([asking], timeout=_POLL_S)
                is_full = self._engine.load().waiting > 0
                if asking.done():
                    if not isinstance(asking.exception(), LimitExceeded):
                        asking.result()
                        return True
                    asking, is_full = None, True
                    await asyncio.sleep(_POLL_S)
                if is_full and progressed():
                    return True
            return False
        finally:
            if asking is not None:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    async def _drop_partner(self) -> None:
        self._ask = None
        await self._open.aclose()


@asynccontextmanager
async def decode_partner(
    engine: PrefillEngine, options: EngineOptions, open_manager: OpenManager, directory: str
) -> AsyncIterator[Ask]:
    """Start a decode engine that receives pages from `engine`, which is registered at `directory`."""
    async with _running(partial(DecodeEngine, engine.model, _smallest(options), open_manager)) as partner:
        # The first token arrives with the pages and ends the request, so the partner's model is never called.
        yield partial(_hand_over, engine, partner, directory, max_tokens=1)


@asynccontextmanager
async def prefill_partner(
    engine: DecodeEngine,
    options: EngineOptions,
    open_manager: Callable[[str], OpenManager],
    directory: KVBootstrapServer,
) -> AsyncIterator[Ask]:
    """Start a prefill engine that computes prompts for `engine`, and the directory at which it registers."""
    async with directory:
        address, allowed = directory.address, engine.manager.allowed
        starting = partial(PrefillEngine, engine.model, _smallest(options), open_manager(address))
        async with _running(starting) as partner:
            allowed.add(address)
            try:
                # The probed engine computes the second token.
                yield partial(_hand_over, partner, engine, address, max_tokens=2)
            finally:
                allowed.remove(address)


@asynccontextmanager
async def _running(start: Callable[[], EngineT]) -> AsyncIterator[EngineT]:
    """Start an engine in a thread, because it blocks until its directory answers, and close it at the end.

    A cancellation does not interrupt the start: the engine is closed after the start has completed.
    """
    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        yield await asyncio.shield(starting)
    finally:
        await asyncio.to_thread((await starting).close)


async def _hand_over(prefill: PrefillEngine, decode: DecodeEngine, directory: str, *, max_tokens: int) -> None:
    room = secrets.randbelow(ROOM_NUMBERS)
    request = Request(
        request_id=f"health-{room}",
        prompt_ids=(0,),
        bootstrap_room=room,
        bootstrap_addr=directory,
        max_tokens=max_tokens,
        ignore_eos=True,
        cache_salt=_SALT,
    )

    async def send() -> None:
        await prefill.prefill(request)

    async def receive() -> None:
        async with aclosing(decode.generate(request)) as events:
            async for _ in events:
                pass

    await together([send(), receive()])


def _smallest(options: EngineOptions) -> EngineOptions:
    return msgspec.structs.replace(
        options, pool_pages=2, chunk_tokens=1, max_running=1, max_waiting=1, refusal_s=WITHIN_S, prefix_cache=False
    )

"""The probe behind `/health_generate`: one token through a room of its own, from or to a partner in this process.

A worker does not use its real partners for this. A prefill worker knows no decode worker before one comes to a room,
and a decode worker could have a prompt computed only by an HTTP request to a prefill worker, whose URL only the router
knows. And a worker whose partner has failed is healthy itself: a failed probe would have it restarted for nothing.

The partner is therefore an engine of the other role in the same process, with the same weights and the smallest pool.
It meets the worker's engine as any partner does, through a directory, a link and the worker's transport, so that a
probe takes the whole way of a request except for the HTTP body.

The partner is started with the first probe and stays until the worker ends. A probe leaves nothing in either of them.
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
"""Seconds that a probe may take, as SGLang's (its SGLANG_HEALTH_CHECK_TIMEOUT)."""
_LOOK_EVERY_S = 0.25
_SALT = "kvroom health"

Ask = Callable[[], Awaitable[None]]
"""Hands one token over in a new room; raises `KVRoomError`."""


class Unhealthy(KVRoomError):
    """No token came through within the time limit."""


class Probe:
    """Probes one engine. `partner` starts the other side; `produced()` counts what the worker has answered so far.

    An engine that is busy may keep a probe waiting behind requests. It is healthy if these get on meanwhile.
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
        """End a probe that runs, then the partner."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._drop_partner()

    async def check(self, produced: Callable[[], int]) -> None:
        """Return when a token came through; raise `KVRoomError` with the reason if none does within the time limit.

        Several callers at the same time share one probe.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run(produced))
        await asyncio.shield(self._running)

    async def _run(self, produced: Callable[[], int]) -> None:
        before = produced()
        try:
            if not await self._came_through(lambda: produced() > before):
                load = self._engine.load()
                here = f"{load.waiting} requests wait, {load.running} run"
                raise Unhealthy(f"timed out: no token came through within {self._within_s:g} s; {here}")
        except KVRoomError:
            await self._drop_partner()  # the fault may be in it, and the next probe has another
            raise

    async def _came_through(self, gets_on: Callable[[], bool]) -> bool:
        """Ask until the token is there, or until the requests that it has to wait behind get on."""
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
                await asyncio.wait([asking], timeout=_LOOK_EVERY_S)
                is_full = self._engine.load().waiting > 0
                if asking.done():
                    if not isinstance(asking.exception(), LimitExceeded):
                        asking.result()
                        return True
                    asking, is_full = None, True
                    await asyncio.sleep(_LOOK_EVERY_S)
                if is_full and gets_on():
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
    """Start a decode engine that takes the pages of `engine`, which is registered at `directory`."""
    async with _running(partial(DecodeEngine, engine.model, _smallest(options), open_manager)) as partner:
        # The first token comes with the pages, and ends the request: the partner's model is never called.
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
                # The second token is computed by the engine that is probed.
                yield partial(_hand_over, partner, engine, address, max_tokens=2)
            finally:
                allowed.remove(address)


@asynccontextmanager
async def _running(start: Callable[[], EngineT]) -> AsyncIterator[EngineT]:
    """Start an engine in a thread, because it waits for its directory, and close it. A start is not cut off."""
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

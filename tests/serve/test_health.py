"""`/health_generate`: one token through a real room, a clear 503 if no token comes, and no room left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from engine.pair import Pair
from engine.tiny import tiny
from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.options import EngineOptions
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import Request
from kvroom.errors import KVRoomError
from kvroom.plan import KVLayout
from kvroom.runtime.manager import KVManager
from kvroom.serve.probe import Probe, Unhealthy, decode_partner, prefill_partner

from .conftest import Served
from .helpers import get, look

OPTIONS = EngineOptions(page_tokens=16)
ONE = {"max_running": 1, "refusal_s": 0.2}


def check_idle(engine: PrefillEngine | DecodeEngine) -> None:
    engine.wait_idle(20.0)
    engine.pool.book.check_idle()
    assert engine.manager.audit().empty


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_hands_one_token_over_and_keeps_nothing(served: Served, role: str) -> None:
    url = served.prefill if role == "prefill" else served.decode
    before = look(url, "/rooms").json()
    for count in (1, 2):
        assert (get(url, "/health_generate").status, get(url, "/health_generate").text) == (200, "ok")
        after = look(url, "/rooms?idle_within_s=10").json()
        assert after["succeeded"] == before["succeeded"] + 2 * count
        assert after["failed"] == before["failed"]
        assert after["pool"] == before["pool"]
        assert after["open"] == []
        assert not any(after["rooms"].values())


def test_the_router_asks_both(served: Served) -> None:
    response = get(served.url, "/health_generate")
    assert response.status == 200
    assert "passed" in response.text


def test_many_at_once_are_few_tokens(served: Served) -> None:
    before = look(served.decode, "/rooms").json()["succeeded"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: get(served.decode, "/health_generate").status, range(64)))
    assert answers == [200] * 64
    assert look(served.decode, "/rooms").json()["succeeded"] - before < 64


@asynccontextmanager
async def probe_of(
    pair: Pair, role: str, within_s: float, starting: threading.Event | None = None
) -> AsyncIterator[Probe]:
    """Yield a probe of one engine of a pair; `starting` is set when its partner opens its manager."""

    def open_manager(address: str | None = None) -> Any:
        def opening(layout: KVLayout, *, on_change: Callable[[], None]) -> KVManager:
            if starting is not None:
                starting.set()
            return KVManager(layout, on_change=on_change, register_with=address)

        return opening

    if role == "prefill":
        partner: Any = partial(decode_partner, pair.prefill, OPTIONS, open_manager(), pair.address)
    else:

        def partner() -> Any:
            return prefill_partner(pair.decode, OPTIONS, open_manager, KVBootstrapServer())

    async with Probe(pair.prefill if role == "prefill" else pair.decode, partner, within_s=within_s) as probe:
        yield probe


def lonely(pair: Pair, **fields: Any) -> Request:
    """Return a request whose other side never joins."""
    return pair.request((1, 2, 3), max_tokens=4, **fields)


async def taken(pair: Pair, role: str, request: Request) -> asyncio.Task[Any]:
    """Submit a request, and return when the engine has taken it."""

    async def serve() -> None:
        if role == "prefill":
            await pair.prefill.prefill(request)
        else:
            async for _ in pair.decode.generate(request):
                pass

    engine = pair.prefill if role == "prefill" else pair.decode
    before = engine.load().running + engine.load().waiting
    task = asyncio.ensure_future(serve())
    while engine.load().running + engine.load().waiting == before:
        await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("waiting", [0, 1], ids=["queued", "refused"])
def test_behind_a_request_that_does_not_move_it_times_out(role: str, waiting: int) -> None:
    async def story() -> None:
        async with probe_of(pair, role, within_s=0.6) as probe:
            tasks = [await taken(pair, role, lonely(pair)) for _ in range(1 + waiting)]
            with pytest.raises(
                Unhealthy, match=r"timed out: no token came through within 0.6 s; \d requests wait, 1 run"
            ):
                await probe.check(lambda: 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await probe.check(lambda: 0)  # healthy again, with a new partner

    options: dict[str, Any] = {role: {**ONE, **({"max_waiting": waiting} if waiting else {})}}
    with Pair(tiny().loaded, bootstrap_s=5.0, **options) as pair:
        asyncio.run(story())
        check_idle(pair.prefill if role == "prefill" else pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_behind_requests_that_get_on_it_is_well(role: str) -> None:
    counts = iter(range(100))

    async def story() -> None:
        async with probe_of(pair, role, within_s=20.0) as probe:
            task = await taken(pair, role, lonely(pair))
            await asyncio.wait_for(probe.check(lambda: next(counts)), 10.0)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    options: dict[str, Any] = {role: ONE}
    with Pair(tiny().loaded, bootstrap_s=5.0, **options) as pair:
        asyncio.run(story())
        check_idle(pair.prefill if role == "prefill" else pair.decode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_has_ended_is_ill_at_once(role: str) -> None:
    async def story() -> None:
        async with probe_of(pair, role, within_s=20.0) as probe:
            await probe.check(lambda: 0)
            engine.close()
            with pytest.raises(KVRoomError, match="takes no more requests: it is closed"):
                await asyncio.wait_for(probe.check(lambda: 0), 10.0)

    with Pair(tiny().loaded) as pair:
        engine = pair.prefill if role == "prefill" else pair.decode
        asyncio.run(story())


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["before the partner starts", "while it starts"])
def test_a_worker_that_ends_during_a_probe_leaves_none(role: str, moment: str) -> None:
    starting = threading.Event()

    async def story() -> None:
        async with probe_of(pair, role, within_s=20.0, starting=starting) as probe:
            checks = [asyncio.ensure_future(probe.check(lambda: 0)) for _ in range(3)]
            await asyncio.sleep(0)
            if moment == "while it starts":
                await asyncio.to_thread(starting.wait)
        ends = await asyncio.gather(*checks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        assert len(asyncio.all_tasks()) == 1

    with Pair(tiny().loaded) as pair:
        asyncio.run(story())
        engines = [one.name for one in threading.enumerate() if one.name in ("PrefillEngine", "DecodeEngine")]
        assert sorted(engines) == ["DecodeEngine", "PrefillEngine"]
        pair.check_idle()

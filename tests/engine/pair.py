"""A prefill and a decode engine in one process, each with its own manager, and a bootstrap directory between them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.core.settings import Timeouts
from kvroom.engine.decode import DecodeEngine
from kvroom.engine.options import EngineOptions
from kvroom.engine.prefill import PrefillEngine
from kvroom.engine.request import PrefillResult, Request, TokenEvent
from kvroom.engine.weights import LoadedModel
from kvroom.plan.layout import KVLayout
from kvroom.runtime.manager import KVManager

DEADLINE_S = 30.0
SIZES = {"pool_pages": 128, "page_tokens": 16, "refusal_s": 5.0}
Served = tuple[list[TokenEvent], PrefillResult]


class Pair:
    """Both engines serve `model`; `prefill` and `decode` change their options."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        transport: str = "auto",
        bootstrap_s: float = 60.0,
    ) -> None:
        self._timeouts = Timeouts(bootstrap_s=bootstrap_s)
        self._transport = transport
        self._rooms = itertools.count(1000)
        self._changed = threading.Event()
        self._open = ExitStack()
        self.address = self._open.enter_context(KVBootstrapServer()).address
        self.prefill = self._open.enter_context(
            PrefillEngine(model, EngineOptions(**{**SIZES, **(prefill or {})}), self._open_prefill_manager)
        )
        self.decode = self._open.enter_context(
            DecodeEngine(model, EngineOptions(**{**SIZES, **(decode or {})}), self._open_decode_manager)
        )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def request(self, prompt_ids: tuple[int, ...], **fields: Any) -> Request:
        """Return a request with a new room."""
        room = next(self._rooms)
        return Request(
            request_id=f"r{room}",
            prompt_ids=prompt_ids,
            bootstrap_room=room,
            bootstrap_addr=self.address,
            **fields,
        )

    def serve(self, *requests: Request) -> list[Served]:
        """Send each request to both engines, as a router does, all at the same time."""

        async def both(request: Request) -> Served:
            prefill = asyncio.ensure_future(self.prefill.prefill(request))
            events = [event async for event in self.decode.generate(request)]
            return events, await prefill

        async def everything() -> list[Served]:
            return await asyncio.wait_for(asyncio.gather(*map(both, requests)), DEADLINE_S)

        return asyncio.run(everything())

    async def offered(self, request: Request) -> None:
        """Wait until the decode side has offered its pages for this request."""

        def is_offered() -> bool:
            rooms = self.decode.manager.rooms()
            return any(view.room == request.bootstrap_room and view.phase == "OFFERED" for view in rooms)

        await asyncio.to_thread(self._wait_until, is_offered)

    def check_idle(self) -> None:
        """Assert that no request, room or page is in use on either side."""
        for engine in (self.prefill, self.decode):
            engine.wait_idle(DEADLINE_S)
            engine.pool.book.check_idle()
            assert engine.manager.audit().empty
            assert engine.stats().error is None

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        self._changed.clear()
        while not condition():
            assert self._changed.wait(end - time.monotonic())
            self._changed.clear()

    def _open_prefill_manager(self, layout: KVLayout, *, on_change: Callable[[], None]) -> KVManager:
        return KVManager(
            layout, timeouts=self._timeouts, transport=self._transport, register_with=self.address, on_change=on_change
        )

    def _open_decode_manager(self, layout: KVLayout, *, on_change: Callable[[], None]) -> KVManager:
        def changed() -> None:
            on_change()
            self._changed.set()

        return KVManager(layout, timeouts=self._timeouts, transport=self._transport, on_change=changed)

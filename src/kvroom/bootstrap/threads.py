"""A server that lives on a loop in a thread of its own, for callers that have no loop.

`start` returns when it accepts or has failed, whatever it failed of: nobody waits for a thread that has died.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager

from kvroom.dialling.names import NAMES, FoundAddress
from kvroom.errors import ConfigurationError
from kvroom.listening.loops import log_loop_errors
from kvroom.wire.address import HostPort


class _Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, which resolves names as `kvroom.dialling.names` does."""

    async def getaddrinfo(  # type: ignore[override]  # typeshed knows the enums of each argument
        self,
        host: str | bytes | None,
        port: str | int | bytes | None,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[FoundAddress]:
        asked = NAMES.look_up(host, port, family=family, kind=type, protocol=proto, flags=flags)
        return await asyncio.wrap_future(asked, loop=self)


def own_loop() -> asyncio.AbstractEventLoop:
    """Return a new loop of asyncio's own kind, whatever kind the process has chosen for itself, that reports its faults
    once a second at most, and in which a slow name holds up nothing else.

    An engine may install uvloop for its HTTP server. There, a connection that is closed while it is being opened may
    never be reported as lost, and `KVManager.close` would wait for that report. Our loops serve only ourselves, so they
    need not be the engine's kind.
    """
    loop = _Loop()
    log_loop_errors(loop)
    return loop


class ServerThread:
    """Runs `serve()`, which yields the address that it listens on, from `start` to `close`.

    `name` is the thread's; `where` is where it is to listen, for messages.
    """

    def __init__(self, name: str, where: HostPort, serve: Callable[[], AbstractAsyncContextManager[str]]) -> None:
        self._name, self._where = name, where
        self._serve = serve
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def running(self) -> bool:
        """Between `start` and `close`."""
        return self._thread is not None

    def start(self) -> str:
        """Return the address; `ConfigurationError` if it cannot listen, and then there is no thread."""
        started: Future[str] = Future()
        thread = threading.Thread(target=self._run, args=(started,), name=self._name, daemon=True)
        thread.start()
        try:
            address = started.result()
        except ConfigurationError:
            thread.join()
            raise
        self._thread = thread
        return address

    def close(self) -> None:
        """Let `serve` end, and the thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    def _run(self, started: Future[str]) -> None:
        try:
            loop = own_loop()
            try:
                loop.run_until_complete(self._until_told(started))
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()
        except ConfigurationError as error:
            started.set_exception(error)
        except BaseException as error:  # ends the wait of the caller of `start`, and goes on to the thread's hook
            if not started.done():
                why = f"{self._name} could not start on {self._where}, {type(error).__name__}: {error}"
                started.set_exception(ConfigurationError(why))
            raise

    async def _until_told(self, started: Future[str]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._serve() as address:
            started.set_result(address)
            await self._stop.wait()

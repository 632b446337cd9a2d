"""A server on an event loop in its own thread, for callers without an event loop.

`start` returns when the server accepts connections and raises when it has failed, whatever the exception was, so its
caller never waits for a thread that has ended.
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
    """asyncio's selector loop with the name resolution of `kvroom.dialling.names`."""

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
    """Return a new asyncio selector loop, regardless of the event loop policy of the process.

    An engine may install uvloop for its HTTP server. uvloop may never report the loss of a connection that is closed
    while it is being opened, and `KVManager.close` would wait for that report. kvroom's loops run only kvroom's code,
    so they need not be of the engine's kind.

    The loop logs unhandled errors at most once a second, and a slow name lookup delays nothing else in it.
    """
    loop = _Loop()
    log_loop_errors(loop)
    return loop


class ServerThread:
    """A thread that runs `serve()` from `start` to `close`. `serve()` yields the address that the server listens on.

    `name` is the name of the thread; `where` is the requested address, for messages.
    """

    def __init__(self, name: str, where: HostPort, serve: Callable[[], AbstractAsyncContextManager[str]]) -> None:
        self._name, self._where = name, where
        self._serve = serve
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def running(self) -> bool:
        """True between `start` and `close`."""
        return self._thread is not None

    def start(self) -> str:
        """Start the thread and return the server's address.

        Raises `ConfigurationError` if the server cannot listen; the thread has ended then.
        """
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
        """End `serve`, and wait until the thread has ended. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    def _run(self, started: Future[str]) -> None:
        try:
            loop = own_loop()
            try:
                loop.run_until_complete(self._until_closed(started))
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()
        except ConfigurationError as error:
            started.set_exception(error)
        except BaseException as error:  # reported to the caller of `start`, which waits, and to the thread's hook
            if not started.done():
                why = f"{self._name} could not start on {self._where}, {type(error).__name__}: {error}"
                started.set_exception(ConfigurationError(why))
            raise

    async def _until_closed(self, started: Future[str]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._serve() as address:
            started.set_result(address)
            await self._stop.wait()

"""The loop thread that owns the rooms, and the calls by which other threads reach it. It contains nothing about rooms.

`Loop` is the interface. `EventLoop` implements it over a loop of asyncio, and `LoopThread` runs such a loop in its own
thread. The laboratory has an `EventLoop` over virtual time.

Every call that runs in a loop is supervised: its exceptions go to `on_error`, and the loop continues.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from kvroom.bootstrap.threads import own_loop
from kvroom.errors import ConfigurationError

T = TypeVar("T")
_WORKERS = 4


class Loop(Protocol):
    """One thread that runs one call after the other, and its clock."""

    def now(self) -> float:
        """Return seconds of a clock that does not run backwards. From any thread."""

    def post(self, call: Callable[[], None]) -> bool:
        """Queue `call` for the loop's thread, from any thread. Return False if the loop has ended and nothing runs."""

    def call(self, call: Callable[[], T]) -> T:
        """Run `call` in the loop's thread, after all calls posted before, and return its result; from any thread."""

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        """Run `call` after `delay_s` seconds, and return the function that cancels it. In the loop's thread."""

    def run_blocking(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` in a worker thread, where it may block."""

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Start `work` as a task of the loop. In the loop's thread."""


class WorkerThreads(Protocol):
    """The part of an executor that a loop uses."""

    def submit(self, call: Callable[[], T], /) -> Future[T]:
        """Run `call` in a thread that may block."""


class EventLoop(ABC):
    """A `Loop` over a loop of asyncio. Until `on_error` is set, exceptions of calls propagate into asyncio."""

    def __init__(self, events: asyncio.AbstractEventLoop, workers: WorkerThreads) -> None:
        self.on_error: Callable[[Exception], None] | None = None
        self._events, self._workers = events, workers
        self._calls: deque[Callable[[], None]] = deque()
        self._awake = False
        self._posting = threading.Lock()  # no call may be queued after `end_calls` took the last one: it would be lost
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        return self._events.time()

    def post(self, call: Callable[[], None]) -> bool:
        with self._posting:
            if self._ended:
                return False
            self._calls.append(call)
            if not self._awake:
                self._awake = True
                self._events.call_soon_threadsafe(self._take_calls)
        return True

    def call(self, call: Callable[[], T]) -> T:
        """Run `call` in the loop's thread and return its result. `ConfigurationError` if the loop has ended."""
        if self.is_current():
            return call()
        result: Future[T] = Future()

        def answer() -> None:
            try:
                result.set_result(call())
            except BaseException as error:  # the caller must not wait without end; the supervisor gets it, too
                result.set_exception(error)
                raise

        if not self.post(answer):
            raise ConfigurationError("this manager is closed")
        return result.result()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        return self._events.call_later(delay_s, partial(self._supervised, call)).cancel

    def run_blocking(self, call: Callable[[], T]) -> Future[T]:
        return self._workers.submit(call)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._events.create_task(work, name=name)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                self._supervised(task.result)

        task.add_done_callback(ended)

    def is_current(self) -> bool:
        """Return True if the caller runs in the thread of this loop."""
        return asyncio._get_running_loop() is self._events  # noqa: SLF001 - the public one raises where none runs

    # -- for its owner, the manager -------------------------------------------------------------------------------

    @abstractmethod
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end and return its result. From any other thread."""

    @abstractmethod
    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end, then `close`, also if it raises. From any other thread."""

    @abstractmethod
    def close(self) -> None:
        """End the loop. When this returns, nothing runs in it. From any other thread."""

    async def end_tasks(self) -> None:
        """Cancel all spawned tasks, and wait until they have ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end_calls(self) -> None:
        """Run the calls that were posted until now, and refuse later ones. In the loop's thread."""
        with self._posting:
            self._ended = True
        self._take_calls()

    def _take_calls(self) -> None:
        self._awake = False
        while self._calls:
            self._supervised(self._calls.popleft())

    def _supervised(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # the supervisor of every call in this loop
            if self.on_error is None:
                raise
            self.on_error(error)


class LoopThread(EventLoop):
    """A loop of asyncio in its own thread, with worker threads. `close` waits until all of them have ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="kvroom-worker")
        super().__init__(own_loop(), self._pool)
        self._thread = threading.Thread(target=self._run, name="kvroom-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._events).result()

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self.run(work)
        finally:
            self.close()

    def close(self) -> None:
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()
        self._pool.shutdown()

    def _run(self) -> None:
        asyncio.set_event_loop(self._events)
        self._events.run_forever()

"""The base of both engines: one thread that alone touches the model, the pool and the requests.

Other threads post functions into the engine's inbox, for calls as well as for changes of a room. The engine's thread
runs them between two steps. When there is nothing to compute, it blocks on the inbox and uses no CPU.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import msgspec

from kvroom import Audit, KVLayout, KVManager
from kvroom.errors import KVRoomError, LimitExceeded

from .options import EngineOptions
from .pages import PoolCounts
from .pool import PagedPool
from .prefix import PageKeys
from .request import Request, check_request
from .weights import LoadedModel

log = logging.getLogger(__name__)

Action = Callable[[], None]
EngineT = TypeVar("EngineT", bound="EngineLoop")


class OpenManager(Protocol):
    """`KVManager` with all arguments except these two bound, for instance by `functools.partial`."""

    def __call__(self, layout: KVLayout, *, on_change: Action) -> KVManager: ...


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of an engine: present ones (`waiting`, `running`, `parting`, `pool`, `groups`) and totals since start."""

    waiting: int
    """Requests that wait for pages."""
    running: int
    """Requests that hold pages, including those whose room is in flight."""
    parting: int
    """Failed rooms that are kept until the other side has received the cause."""
    succeeded: int
    failed: int
    prompt_tokens_computed: int
    """Prompt tokens that went through this engine's model."""
    prompt_tokens_cached: int
    """Prompt tokens that this engine found in its prefix cache."""
    pages_evicted: int
    """Cached pages that were reused for other contents."""
    pool: PoolCounts
    """Pages of the main page table."""
    groups: dict[str, PoolCounts]
    """Pages of sliding windows and slots of states, for models that have them."""
    error: str | None
    """The reason why the engine takes no more requests, or None while it does."""


class EngineStats(EngineLoad, frozen=True, kw_only=True):
    """The counts of `EngineLoad`, and an audit of the manager's rooms."""

    rooms: Audit


class EngineLoop(ABC):
    """The engine's thread, its inbox, a limit on open requests, and an orderly end. A context manager."""

    def __init__(
        self, model: LoadedModel, options: EngineOptions, open_manager: OpenManager, *, chunk_tokens: int
    ) -> None:
        self.model = model
        self.options = options
        self.pool = PagedPool(
            model.shape,
            pages=options.pool_pages,
            page_tokens=options.page_tokens,
            dtype=model.dtype,
            device=model.device,
            slots=options.max_running,
            chunk_tokens=chunk_tokens,
        )
        self.succeeded = self.failed = self.prompt_tokens_computed = self.prompt_tokens_cached = 0
        self._page_keys = PageKeys.agreeing(model.fingerprint, model.dtype, page_tokens=options.page_tokens)
        self._inbox: SimpleQueue[Action] = SimpleQueue()
        self._lock = threading.Lock()  # guards `_admitted` and `_ended`, which any thread may read
        self._admitted = 0
        self._closing = False
        self._ended: str | None = None
        self._idle_waiters: list[Future[None]] = []
        self.manager = open_manager(self.pool.layout(model.fingerprint), on_change=partial(self._inbox.put, _wake_up))
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def __enter__(self: EngineT) -> EngineT:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that the model cannot serve. Changes nothing."""
        check_request(request, vocab_size=self.model.vocab_size, model_tokens=self.model.max_tokens)

    def close(self) -> None:
        """Fail every request, abort every room, and end the thread and the manager. Idempotent.

        Waits at most `close_s` for the rooms to drain. Pages of rooms that did not drain stay in quarantine: a peer may
        still write into them, so their memory must not be freed before the process ends.
        """
        if self._closing:
            return
        self._closing = True
        self._inbox.put(_wake_up)
        self._thread.join()
        self.manager.wait_idle(self.options.close_s)
        self.manager.close()
        self._run_inbox()  # releases of rooms that drained while the manager closed

    def stats(self) -> EngineStats:
        """Return counts for a status page, from any thread. The cost grows with the number of rooms."""
        return EngineStats(**msgspec.structs.asdict(self.load()), rooms=self.manager.audit())

    def load(self) -> EngineLoad:
        """Return counts for a monitor, from any thread, at constant cost."""
        waiting, running, parting = self._counts()
        return EngineLoad(
            waiting=waiting,
            running=running,
            parting=parting,
            succeeded=self.succeeded,
            failed=self.failed,
            prompt_tokens_computed=self.prompt_tokens_computed,
            prompt_tokens_cached=self.prompt_tokens_cached,
            pages_evicted=self.pool.book.evicted,
            pool=self.pool.book.counts(),
            groups=self.pool.others(),
            error=self._ended,
        )

    def wait_idle(self, timeout_s: float) -> None:
        """Block until no request, no room and no held page is left; otherwise raise `TimeoutError` with the counts."""
        end = time.monotonic() + timeout_s
        waiter: Future[None] = Future()
        self._inbox.put(lambda: self._idle_waiters.append(waiter))
        done = wait([waiter], timeout_s).done
        if not done:
            waiter.cancel()
        if not done or not self.manager.wait_idle(end - time.monotonic()):
            raise TimeoutError(f"timed out: the engine is not idle after {timeout_s:g} s: {self.stats()}")

    @property
    def prefix_cache(self) -> str:
        """The text "on", or "off" with the reason.

        A prefix is reusable only if the keys and values of each of its tokens are still there. Sliding windows and
        states overwrite older tokens, so models that have them cannot use a prefix cache.
        """
        if not self.options.prefix_cache:
            return "off: disabled by an option"
        groups = sorted(self.pool.others())
        return f"off: the model keeps only the newest tokens of {' and '.join(groups)}" if groups else "on"

    def drop_cache(self) -> Future[int]:
        """Free every cached page that no request uses; the result of the future is their number.

        Raises `KVRoomError` if the engine has ended. If the engine ends during the call, the future never completes:
        wait for it with a time limit.
        """
        with self._lock:
            if self._ended is not None:
                raise KVRoomError(f"the engine has ended: {self._ended}")
        dropped: Future[int] = Future()
        self._inbox.put(lambda: dropped.set_result(self.pool.book.drop_cache()))
        return dropped

    # -- for the two engines -------------------------------------------------------------------------------------------

    @abstractmethod
    def _step(self) -> None:
        """Admit waiting requests, poll the rooms, and compute at most one forward call."""

    @abstractmethod
    def _due(self) -> float | None:
        """Return the `time.monotonic` at which a step is due even with an empty inbox, or None if there is none.

        0.0 means that the next step has something to compute.
        """

    @abstractmethod
    def _counts(self) -> tuple[int, int, int]:
        """Return the numbers of waiting requests, running requests, and parting rooms."""

    @abstractmethod
    def _fail_all(self, detail: str) -> None:
        """End every request with an error."""

    @abstractmethod
    def _clear_parted(self) -> None:
        """Clear the failed rooms whose other side has received the cause; all of them if the engine is closing."""

    def _keys(self, tokens: Sequence[int], salt: str, known: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """Return the prefix index keys of the full pages of `tokens`; empty without a prefix cache.

        `known` are the keys of the first pages, if they were computed before.
        """
        return self._page_keys.salted(salt).of(tokens, known) if self.prefix_cache == "on" else ()

    def _admit(self, submit: Action) -> None:
        """Count one more open request and post `submit`.

        Raises `LimitExceeded` at the limit, and `KVRoomError` if the engine has ended. Nothing is counted then.
        """
        most = self.options.max_running + self.options.max_waiting
        with self._lock:
            if self._ended is not None:
                raise KVRoomError(f"the engine takes no more requests: {self._ended}")
            if self._admitted >= most:
                raise LimitExceeded(f"too many open requests ({self._admitted}, limit {most}): retry later")
            self._admitted += 1
            self._inbox.put(submit)

    def _leave(self, *, succeeded: bool) -> None:
        """Count one open request less, and its outcome."""
        with self._lock:
            self._admitted -= 1
        self.succeeded += succeeded
        self.failed += not succeeded

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve(self._step)
        except Exception as error:  # the thread's supervisor: an error fails every request and is logged
            log.exception("the engine's thread stopped: it fails all requests")
            self._refuse_all(f"it failed with {type(error).__name__}: {error}")
            # The thread goes on without computing, so that the other sides of failed rooms still get the cause.
            self._serve(self._clear_parted)
        self._refuse_all("it is closed")
        self._clear_parted()

    def _serve(self, step: Action) -> None:
        while not self._closing:
            due = self._due()
            try:
                action = self._inbox.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                pass
            else:
                action()
            self._run_inbox()
            step()
            self._idle_waiters = [waiter for waiter in self._idle_waiters if not waiter.cancelled()]
            if not self._idle_waiters or any(self._counts()):
                continue
            # After an error the books may be wrong, and a second exception here would end the thread before the other
            # sides of its failed rooms have received the cause.
            if self._ended is None:
                self.pool.check()
            if self.pool.whole():
                for waiter in self._idle_waiters:
                    if waiter.set_running_or_notify_cancel():
                        waiter.set_result(None)
                self._idle_waiters.clear()

    def _refuse_all(self, detail: str) -> None:
        with self._lock:
            self._ended = self._ended or detail
        self._run_inbox()
        self._fail_all(f"the engine takes no more requests: {self._ended}")

    def _run_inbox(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except Empty:
                return
            action()


def _wake_up() -> None:
    """Do nothing: posted only to wake the thread, which then polls all rooms."""

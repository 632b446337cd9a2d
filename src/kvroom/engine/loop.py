"""What both engines are: one thread that alone touches the model, the pool and the requests.

Everything that others want of an engine, a room's news included, is a function posted into its inbox and run in that
thread, between two steps. With nothing to compute the thread sleeps on the inbox; it never spins.
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
from kvroom.engine.options import EngineOptions
from kvroom.engine.pages import PoolCounts
from kvroom.engine.pool import PagedPool
from kvroom.engine.prefix import PageKeys
from kvroom.engine.request import Request, check_request
from kvroom.engine.weights import LoadedModel
from kvroom.errors import KVRoomError, LimitExceeded

log = logging.getLogger(__name__)

Action = Callable[[], None]
EngineT = TypeVar("EngineT", bound="EngineLoop")


class OpenManager(Protocol):
    """`KVManager` with everything but these two bound, for instance by `functools.partial`."""

    def __call__(self, layout: KVLayout, *, on_change: Action) -> KVManager: ...


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's counts now (`waiting`, `running`, `parting`, `pool`) and since its start (the others).

    `parting`: failed rooms that are kept until the other side has been told. `prompt_tokens_cached`: of prompts, those
    that were in the prefix cache here. `pages_evicted`: cached pages that were given out for other contents. `groups`:
    the pages of sliding windows and the slots of states, for models that have them. `fault`: why the engine's thread
    ended.
    """

    waiting: int
    running: int
    parting: int
    succeeded: int
    failed: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    pages_evicted: int
    pool: PoolCounts
    groups: dict[str, PoolCounts]
    fault: str | None


class EngineStats(EngineLoad, frozen=True, kw_only=True):
    """The same with what is kept of rooms, recounted."""

    rooms: Audit


class EngineLoop(ABC):
    """The thread, its inbox, admission by count, and an end that leaves nothing open. A context manager."""

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
        self.manager = open_manager(self.pool.layout(model.fingerprint), on_change=partial(self._inbox.put, _nothing))
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def __enter__(self: EngineT) -> EngineT:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that the model cannot serve. Nothing is touched."""
        check_request(request, vocab_size=self.model.vocab_size, model_tokens=self.model.max_tokens)

    def close(self) -> None:
        """End every request with an error, every room with an abort, then the thread and the manager. Idempotent.

        Waits `close_s` at most for peers to fall quiet. Pages of rooms whose peers did not stay in quarantine, and
        must not be freed before the process ends.
        """
        if self._closing:
            return
        self._closing = True
        self._inbox.put(_nothing)
        self._thread.join()
        self.manager.wait_idle(self.options.close_s)
        self.manager.close()
        self._run_inbox()  # the last pages that came back

    def stats(self) -> EngineStats:
        """Counts for a status page, from any thread. Costs as much as there are rooms."""
        return EngineStats(**msgspec.structs.asdict(self.load()), rooms=self.manager.audit())

    def load(self) -> EngineLoad:
        """Counts for a monitor, from any thread. Costs the same whatever is open."""
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
            fault=self._ended,
        )

    def wait_idle(self, timeout_s: float) -> None:
        """Block until no request and no room is left, and none holds a page. `TimeoutError` names what is left."""
        end = time.monotonic() + timeout_s
        waiter: Future[None] = Future()
        self._inbox.put(lambda: self._idle_waiters.append(waiter))
        done = wait([waiter], timeout_s).done
        if not done:
            waiter.cancel()
        if not done or not self.manager.wait_idle(end - time.monotonic()):
            raise TimeoutError(f"not idle after {timeout_s:g} s: {self.stats()}")

    @property
    def prefix_cache(self) -> str:
        """ "on", or why there is none.

        A prefix can be used again only if all is there that the model keeps of it: the keys and values of each token.
        Of a sliding window and of a state the engine keeps the newest only.
        """
        if not self.options.prefix_cache:
            return "off: switched off"
        groups = sorted(self.pool.others())
        return f"off: of {' and '.join(groups)} the model keeps only what is newest" if groups else "on"

    def drop_cache(self) -> Future[int]:
        """Forget every cached page that no request uses. The result, soon: how many they were.

        Raises `KVRoomError` if the engine has ended. One that ends just now leaves the result open.
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
        """Do what can be done now: admit, look at the rooms, compute one forward call."""

    @abstractmethod
    def _due(self) -> float | None:
        """Return when (`time.monotonic`) a step is due even if nothing comes in; 0.0 if it would compute something."""

    @abstractmethod
    def _counts(self) -> tuple[int, int, int]:
        """Requests waiting, running, and rooms parting."""

    @abstractmethod
    def _fail_all(self, cause: str) -> None:
        """End every request with an error."""

    @abstractmethod
    def _clear_parted(self) -> None:
        """Let failed rooms go whose other side has been told; all of them if the engine is closing."""

    def _keys(self, tokens: Sequence[int], salt: str, known: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """What the full pages of `tokens` are filed under for this `cache_salt`; none without a prefix cache."""
        return self._page_keys.salted(salt).of(tokens, known) if self.prefix_cache == "on" else ()

    def _admit(self, submit: Action) -> None:
        """Count one request in and post it, or raise `LimitExceeded`; `KVRoomError` if the engine has ended."""
        most = self.options.max_running + self.options.max_waiting
        with self._lock:
            if self._ended is not None:
                raise KVRoomError(f"the engine takes no more requests: {self._ended}")
            if self._admitted >= most:
                raise LimitExceeded(f"{self._admitted} requests are open and the limit is {most}: try again later")
            self._admitted += 1
            self._inbox.put(submit)

    def _leave(self, *, succeeded: bool) -> None:
        """Count one request out."""
        with self._lock:
            self._admitted -= 1
        self.succeeded += succeeded
        self.failed += not succeeded

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve(self._step)
        except Exception as fault:  # the thread's supervisor: a fault ends every request, never silently
            log.exception("the engine's thread has stopped computing")
            self._refuse_all(f"it failed with {type(fault).__name__}: {fault}")
            self._serve(self._clear_parted)  # the other sides are still told why
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
            if self._ended is None:  # an engine that has ended for this very reason still has others to tell
                self.pool.check()
            if self.pool.whole():
                for waiter in self._idle_waiters:
                    if waiter.set_running_or_notify_cancel():
                        waiter.set_result(None)
                self._idle_waiters.clear()

    def _refuse_all(self, cause: str) -> None:
        with self._lock:
            self._ended = self._ended or cause
        self._run_inbox()
        self._fail_all(f"the engine takes no more requests: {self._ended}")

    def _run_inbox(self) -> None:
        while True:
            try:
                action = self._inbox.get_nowait()
            except Empty:
                return
            action()


def _nothing() -> None:
    """Wakes the thread; what has changed it finds by itself."""

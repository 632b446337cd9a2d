"""The workers' side: orders become calls of this rank's `KVManager`, and ended rooms become reports to vLLM.

The law: each request is reported to vLLM once, and only when no peer can touch its blocks any longer. A load is
reported when its room has released its pages, in success or failure. The failure itself is reported earlier, so that
the client need not wait.

vLLM identifies a request by its id, and the library a room by its handle, so there are two tables from ids to handles.
Nothing else is kept here: the state of a room belongs to the manager. A request leaves its table when it is reported.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvroom import Aux, KVManager, KVPoll, KVReceiver, KVSender, encode_aux
from kvroom.errors import KVRoomError

from .orders import Drop, Load, Orders

log = logging.getLogger("vllm." + __name__)


@dataclass
class _Sending:
    """A request that is being sent."""

    handle: KVSender | None
    """None if the room could not be opened."""
    over: bool = False
    """True if vLLM waits for the report."""


@dataclass
class _Loading:
    """A request that is being loaded."""

    handle: KVReceiver | None
    """None if the room could not be opened."""
    load: Load | None = None
    """None until the request has blocks."""
    error: str | None = None
    reported: bool = False
    """True if the failure was reported to vLLM, or vLLM has ended the request itself."""


@dataclass
class StepReport:
    """The report of one step to vLLM."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    """The loads that have ended, in success or failure."""
    failed: dict[str, str] = field(default_factory=dict)
    """The loads that have failed, with the reason. They are in `received` of this report or of a later one."""
    blocks: set[int] = field(default_factory=set)
    """The blocks of the failed loads."""
    blockless: set[str] = field(default_factory=set)
    """The failed loads without any block."""

    def __bool__(self) -> bool:
        return bool(self.sent or self.received or self.failed)


class WorkerSide:
    """The worker's side of the connector, once the KV pool is registered. Called by one thread of vLLM."""

    def __init__(self, open_manager: Callable[[Callable[[], None]], KVManager], idle_wait_s: float) -> None:
        self._news = threading.Event()
        self.manager = open_manager(self._news.set)
        self._idle_wait_s = idle_wait_s
        self._active_s = 0.0  # the time of the last step that computed or reported something
        self._sending: dict[str, _Sending] = {}
        self._loading: dict[str, _Loading] = {}
        self._tickets = 0
        self.tokens_loaded = self.tokens_sent = 0

    # -- orders --------------------------------------------------------------------------------------------------------

    def preempt(self, orders: Orders) -> None:
        """End the rooms that were sent some of the preempted blocks, before vLLM overwrites these."""
        for order in orders.aborts:
            self._abort(order.request, order.detail)

    def begin(self, orders: Orders) -> None:
        """Open and release rooms before the forward pass, so that peers need not wait for its end."""
        self._tickets = orders.tickets
        for opened in orders.opens:
            with self._attempt(opened.request):
                self._sending[opened.request] = sending = _Sending(None)
                sending.handle = self.manager.sender(opened.room, identity=opened.identity, on_release=self._wake)
                log.debug("request %s is room %d", opened.request, opened.room)
        for expected in orders.expects:
            with self._attempt(expected.request):
                self._loading[expected.request] = loading = _Loading(None)
                loading.handle = self.manager.receiver(
                    expected.bootstrap_addr, expected.room, identity=expected.identity, on_release=self._wake
                )
                log.debug("request %s is room %d", expected.request, expected.room)
        for dropped in orders.drops:
            with self._attempt(dropped.request):
                self._drop(dropped)
        self.preempt(orders)  # again: one of these rooms may have been opened just now

    def load(self, orders: Orders) -> None:
        """Offer the blocks of this step's loads, which may be written from now on."""
        for load in orders.loads:
            with self._attempt(load.request):
                loading = self._loading.setdefault(load.request, _Loading(None))
                loading.load, loading.error = load, loading.error or load.error
                if loading.handle is None and load.bootstrap_addr:
                    loading.handle = self.manager.receiver(
                        load.bootstrap_addr, load.room, identity=load.identity, on_release=self._wake
                    )
                if loading.handle is None:
                    continue
                if loading.error is not None:
                    loading.handle.abort(loading.error)
                    continue
                windows = self._local_groups(load.windows)
                loading.handle.send_metadata(
                    load.pages, tokens=load.stop, decode_prefix_len=load.start, windows=windows
                )

    def send(self, orders: Orders) -> None:
        """Send the blocks of the forward pass, which may be read from now on, and take in the requests that ended."""
        for send in orders.sends:
            with self._attempt(send.request):
                handle = self._sending[send.request].handle
                if handle is None:
                    continue
                aux = encode_aux(Aux(tokens=send.stop)) if send.last else b""
                handle.send(
                    send.pages, stop=send.stop, last=send.last, aux=aux, windows=self._local_groups(send.windows)
                )
        for finish in orders.finishes:
            sending, loading = self._sending.get(finish.request), self._loading.get(finish.request)
            if sending is not None:
                sending.over = True
            elif loading is not None:
                loading.reported = True  # vLLM has ended the request, so no failure is reported
            else:
                continue  # it was reported in the same step in which vLLM ended it
            if finish.detail is not None:
                self._abort(finish.request, finish.detail)

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, *, idle: bool) -> StepReport:
        """Return the requests that have ended since the last report. With `idle`, wait for one, but not for long."""
        report = self._report()
        if idle and not report:
            # vLLM steps all ranks of an engine together while one of them has a room. A rank without a room would spin
            # until the others are done, on a core that they or their peers may need. It waits for as long as it has
            # been idle, so the end of another rank's room is reported after at most twice the time.
            patience_s, ranks = self._idle_wait_s, self.manager.parallel
            if not self.busy:
                alone = ranks.tp * ranks.pp == 1
                patience_s = 0.0 if alone else min(patience_s, time.monotonic() - self._active_s)
            self._news.wait(patience_s)
            report = self._report()
        if report or not idle:
            self._active_s = time.monotonic()
        return report

    @property
    def busy(self) -> bool:
        """True if a request of this worker waits for its room."""
        return bool(self._sending or self._loading)

    def counts(self) -> dict[str, int]:
        """Return the number of requests on this side, by activity. All are zero when nothing is open."""
        return {"sending": len(self._sending), "loading": len(self._loading), "tickets": self._tickets}

    def close(self) -> None:
        """End every room. Blocks of rooms that could not be drained must not be reused until the process ends."""
        self.manager.close()

    # -- one order -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _attempt(self, request: str) -> Iterator[None]:
        """Carry out one order. An exception fails this request and no other."""
        try:
            yield
        except Exception as error:  # a supervisor: an exception that leaves a hook ends vLLM's engine
            if not isinstance(error, KVRoomError):
                log.exception("request %s: internal error in the connector", request)
            self._abort(request, f"{type(error).__name__}: {error}")

    def _abort(self, request: str, detail: str) -> None:
        """Abort the rooms of a request. A load then fails with `detail`, unless it has failed before."""
        sending, loading = self._sending.get(request), self._loading.get(request)
        for known in (sending, loading):
            if known is not None and known.handle is not None:
                known.handle.abort(detail)
        if loading is not None:
            loading.error = loading.error or detail

    def _drop(self, order: Drop) -> None:
        if order.bootstrap_addr is None:
            sending = self._sending.pop(order.request, None)
            sender = sending.handle if sending and sending.handle else self.manager.sender(order.room)
            sender.abort_and_linger(order.detail)
            return
        loading = self._loading.pop(order.request, None)
        receiver = loading.handle if loading and loading.handle else None
        if receiver is None and any(one.load and one.load.room == order.room for one in self._loading.values()):
            # vLLM repeats a failed request only to release its room. The failed one notifies the producer itself.
            return
        receiver = receiver or self.manager.receiver(order.bootstrap_addr, order.room)
        receiver.abort(order.detail)
        receiver.clear()

    def _local_groups(self, windows: dict[str, list[int]]) -> dict[str, list[int]]:
        """Return the groups of which this rank has layers, because a pipeline stage may lack some."""
        tables = self.manager.layout.tables
        return {group: pages for group, pages in windows.items() if group in tables and tables[group].pages}

    def _wake(self, _pages: tuple[int, ...]) -> None:
        self._news.set()

    # -- ended rooms ---------------------------------------------------------------------------------------------------

    def _report(self) -> StepReport:
        self._news.clear()  # first, so that an event during the check wakes the next wait
        report = StepReport()
        for request, sending in list(self._sending.items()):
            handle = sending.handle
            if not sending.over or (handle is not None and not handle.released):
                continue
            del self._sending[request]
            if handle is not None and handle.poll() is KVPoll.Success:
                self.tokens_sent += handle.wait().tokens
                handle.clear()
            elif handle is not None:
                handle.abort_and_linger("the prefill engine released the request before the decode side was done")
            report.sent.add(request)
        for request, loading in list(self._loading.items()):
            if loading.load is not None:
                self._report_load(request, loading, loading.load, report)
        return report

    def _report_load(self, request: str, loading: _Loading, load: Load, report: StepReport) -> None:
        handle = loading.handle
        status = KVPoll.Failed if handle is None else handle.poll()
        if status is KVPoll.Failed and loading.error is None:
            loading.error = "its room could not be opened"
            try:
                if handle is not None:
                    handle.failure_exception()
            except KVRoomError as error:
                loading.error = str(error)
        if loading.error is not None and not loading.reported:
            loading.reported = True
            where = f" from room {load.room}" if load.bootstrap_addr else ""
            log.error("request %s cannot be loaded%s: %s", request, where, loading.error)
            report.failed[request] = loading.error
            report.blocks.update(load.blocks)
            if not load.blocks:
                report.blockless.add(request)
        if handle is None or (handle.released and status in (KVPoll.Success, KVPoll.Failed)):
            del self._loading[request]
            report.received.add(request)
            if handle is not None:
                handle.clear()
            if loading.error is None:
                self.tokens_loaded += load.stop - load.start

"""The workers' side: orders become calls of this rank's `KVManager`, and ended rooms become reports to vLLM.

The law: vLLM hears of each request once, and never before nobody can touch its blocks any more. A load is reported
when its room has released its pages, well or not; a failure is told before that, so that the client need not wait.

vLLM names a request by its id and a room has a handle, so there are two tables from one to the other, and nothing else
is kept here: what becomes of a room is the manager's. A request leaves its table with its report.
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
    """`handle` None: the room could not even be opened. `over`: vLLM waits for our report."""

    handle: KVSender | None
    over: bool = False


@dataclass
class _Loading:
    """`load` None: the request has no blocks yet. `told`: vLLM knows of its failure, or has ended it by itself."""

    handle: KVReceiver | None
    load: Load | None = None
    error: str | None = None
    told: bool = False


@dataclass
class StepReport:
    """What one step tells vLLM. `failed` requests are in `received`, too, or follow there; `blocks`: theirs.

    `blockless`: the failed ones that no block stands for.
    """

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    blocks: set[int] = field(default_factory=set)
    blockless: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.sent or self.received or self.failed)


class WorkerSide:
    """Everything that a worker's connector does once its KV pool is registered. One thread of vLLM calls it."""

    def __init__(self, open_manager: Callable[[Callable[[], None]], KVManager], idle_wait_s: float) -> None:
        self._news = threading.Event()
        self.manager = open_manager(self._news.set)
        self._idle_wait_s = idle_wait_s
        self._active_s = 0.0  # when a step last computed something or told vLLM something
        self._sending: dict[str, _Sending] = {}
        self._loading: dict[str, _Loading] = {}
        self._tickets = 0
        self.tokens_loaded = self.tokens_sent = 0

    # -- orders --------------------------------------------------------------------------------------------------------

    def preempt(self, orders: Orders) -> None:
        """Before vLLM overwrites blocks that it took away: rooms that were sent some of them end."""
        for spoiled in orders.spoils:
            self._spoil(spoiled.request, spoiled.detail)

    def begin(self, orders: Orders) -> None:
        """Before the forward pass: rooms are opened and let go, so that peers need not wait for its end."""
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
        self.preempt(orders)  # once more: a room of these may have been opened just now

    def load(self, orders: Orders) -> None:
        """When the blocks of this step's loads may be written: offer them."""
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
                windows = self._here(load.windows)
                loading.handle.send_metadata(
                    load.pages, tokens=load.stop, decode_prefix_len=load.start, windows=windows
                )

    def send(self, orders: Orders) -> None:
        """After the forward pass: its blocks may be read. Then what is over."""
        for send in orders.sends:
            with self._attempt(send.request):
                handle = self._sending[send.request].handle
                if handle is None:
                    continue
                aux = encode_aux(Aux(tokens=send.stop)) if send.last else b""
                handle.send(send.pages, stop=send.stop, last=send.last, aux=aux, windows=self._here(send.windows))
        for finish in orders.finishes:
            sending, loading = self._sending.get(finish.request), self._loading.get(finish.request)
            if sending is not None:
                sending.over = True
            elif loading is not None:
                loading.told = True  # nobody is there to be told
            else:
                continue  # it was reported in the step in which vLLM ended it
            if finish.detail is not None:
                self._spoil(finish.request, finish.detail)

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, *, idle: bool) -> StepReport:
        """What has ended since the last time. An idle step waits for it a while, instead of coming back at once."""
        report = self._report()
        if idle and not report:
            # vLLM steps all ranks of an engine together, as long as one of them has a room. A rank that has none would
            # spin until the others are done: on a core that they or their peers may need. It waits as long as it has
            # had nothing to do, so the end of another rank's room is told at most twice as late.
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
        """Whether a request here waits for its room."""
        return bool(self._sending or self._loading)

    def counts(self) -> dict[str, int]:
        """How many requests this side knows, by what is done for them; all zeros when nothing is."""
        return {"sending": len(self._sending), "loading": len(self._loading), "tickets": self._tickets}

    def close(self) -> None:
        """End every room. The blocks of rooms that could not be drained stay unsafe until the process ends."""
        self.manager.close()

    # -- one order -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _attempt(self, request: str) -> Iterator[None]:
        """Carry one order out; what goes wrong ends this request and no other."""
        try:
            yield
        except Exception as error:  # a supervisor: vLLM's engine dies of whatever leaves a hook
            if not isinstance(error, KVRoomError):
                log.exception("request %s: a fault in the connector", request)
            self._spoil(request, f"{type(error).__name__}: {error}")

    def _spoil(self, request: str, detail: str) -> None:
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
            return  # vLLM repeats a request that failed, only to let its room go: the first one tells the producer
        receiver = receiver or self.manager.receiver(order.bootstrap_addr, order.room)
        receiver.abort(order.detail)
        receiver.clear()

    def _here(self, windows: dict[str, list[int]]) -> dict[str, list[int]]:
        """The groups of which this rank has layers: a pipeline stage may lack some."""
        tables = self.manager.layout.tables
        return {group: pages for group, pages in windows.items() if group in tables and tables[group].pages}

    def _wake(self, _pages: tuple[int, ...]) -> None:
        self._news.set()

    # -- what has ended ------------------------------------------------------------------------------------------------

    def _report(self) -> StepReport:
        self._news.clear()  # before looking: what happens meanwhile wakes the next wait
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
                handle.abort_and_linger("the prefill engine has let the request go")
            report.sent.add(request)
        for request, loading in list(self._loading.items()):
            if loading.load is not None:
                self._look(request, loading, loading.load, report)
        return report

    def _look(self, request: str, loading: _Loading, load: Load, report: StepReport) -> None:
        handle = loading.handle
        status = KVPoll.Failed if handle is None else handle.poll()
        if status is KVPoll.Failed and loading.error is None:
            loading.error = "its room could not be opened"
            try:
                if handle is not None:
                    handle.failure_exception()
            except KVRoomError as error:
                loading.error = str(error)
        if loading.error is not None and not loading.told:
            loading.told = True
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

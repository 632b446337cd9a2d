"""Virtual time. Everything that happens is an event in one queue, so a seed determines the order of all events.

A simulated process is an event loop: its callbacks, timers and tasks run here, one at a time, while the process is
alive and not stopped. Nothing sleeps, there are no threads, and the wall clock is never read.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvroom.wire.address import HostPort

if TYPE_CHECKING:
    from .network import Listener, Network

T = TypeVar("T")
MAX_EVENTS = 200_000
"""A run with more events than this is taken for an endless loop."""
_LATE_S = 1e-9
"""Added to the time of a timer: rounding between two clocks must not make it fire early."""


class LawBroken(AssertionError):
    """A law did not hold in a run. The text names the law, the time and the process."""


class _Event(NamedTuple):
    at: float
    order: int
    process: Process | None
    handle: asyncio.Handle | Callable[[], object]


class World:
    """The clock, the event queue, the random choices and the record of one run."""

    def __init__(self, seed: int, *, tracing: bool) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.tracing = tracing
        self.trace: list[str] = []
        self.tally: Counter[str] = Counter()
        """Counts of faults, of successes, and of failures by cause."""
        self.names: set[int] = set()
        """Numbers and generations of all rooms. None of them may be found in a manager once the rooms are gone."""
        self.ends: dict[tuple[int, str], tuple[str, float]] = {}
        """(label of the request, side) -> the failure with which it ended, and when."""
        self.events = 0
        self.broken: str | None = None
        self._queue: list[_Event] = []
        self._order = itertools.count()

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Schedule an event that belongs to no process."""
        self.push(when, None, call)

    def push(self, when: float, process: Process | None, handle: asyncio.Handle | Callable[[], object]) -> None:
        heapq.heappush(self._queue, _Event(max(when, self.now), next(self._order), process, handle))

    def run(self, until: float) -> None:
        """Run every event that is due by then. Raise `LawBroken` at the first broken law."""
        queue = self._queue
        while queue and queue[0].at <= until:
            event = heapq.heappop(queue)
            self.now = event.at
            self.events += 1
            if event.process is not None:
                event.process.run_handle(event.handle)
            else:
                assert not isinstance(event.handle, asyncio.Handle)  # handles belong to processes
                event.handle()
            if self.broken is not None:
                raise LawBroken(self.broken)
            if self.events > MAX_EVENTS:
                raise LawBroken(f"the run has not ended after {MAX_EVENTS} events")
        self.now = until

    def say(self, who: object, what: str, *about: object) -> None:
        """Add a line to the trace, if tracing is on."""
        if self.tracing:
            self.trace.append(f"{self.now:9.4f}  {who!s:<12} {what.format(*about)}")

    def violate(self, law: str) -> None:
        """Record a broken law; the run ends after this event.

        Never raises: the code under test might catch the exception.
        """
        self.say("LAW BROKEN", "{}", law)
        self.broken = self.broken or f"{law} (at {self.now:.4f} s)"

    def count(self, what: str) -> None:
        self.tally[what] += 1

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Process(asyncio.AbstractEventLoop):
    """One process: an event loop on virtual time, whose clock has an offset of its own."""

    def __init__(self, world: World, network: Network, name: str, address: tuple[str, int]) -> None:
        self.world, self.network = world, network
        self.name, self.address = name, address
        self.machine, self.boot, self.pid = "", "", 0
        """The machine, its boot, and the pid there. Two processes of one boot can look each other up."""
        self.alive, self.stopped = True, False
        self.host_up = True
        """True if the machine of a dead process still runs: it refuses connections and resets old ones."""
        self.cut = False
        """True if the process is cut off the network for good. The process does not notice that."""
        self.stopped_s = 0.0
        """The total time that the process was stopped."""
        self._stopped_at = 0.0
        self._clock_offset = world.random.uniform(0.0, 1000.0)
        self._tasks: list[asyncio.Task[Any]] = []
        self._parked: list[asyncio.Handle | Callable[[], object]] = []

    def __str__(self) -> str:
        return self.name

    # -- called by the world --------------------------------------------------------------------------------------

    def run_handle(self, handle: asyncio.Handle | Callable[[], object]) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._parked.append(handle)
            return
        asyncio._set_running_loop(self)  # noqa: SLF001 - the way in which a loop declares that it runs; the same below
        try:
            if not isinstance(handle, asyncio.Handle):
                handle()
            elif not handle.cancelled():
                handle._run()  # noqa: SLF001
        finally:
            asyncio._set_running_loop(None)  # noqa: SLF001

    def kill(self) -> None:
        """End the process.

        Nothing of it runs again; its tasks are closed, so that collecting them logs no complaint.
        """
        self.alive = False
        self._parked.clear()
        for task in self._tasks:
            if not task.done():
                task.get_coro().close()
        self._tasks.clear()

    def stop(self) -> None:
        self.stopped, self._stopped_at = True, self.world.now

    def go_on(self) -> None:
        """Continue after a stop. As in a real loop, received data is read before timers run."""
        if not self.stopped:
            return
        self.stopped = False
        self.stopped_s += self.world.now - self._stopped_at
        parked, self._parked = self._parked, []
        for handle in sorted(parked, key=lambda handle: isinstance(handle, asyncio.TimerHandle)):
            self.world.push(self.world.now, self, handle)

    # -- called by the code in the process ------------------------------------------------------------------------

    def time(self) -> float:
        return self.world.now + self._clock_offset

    def call_soon(  # type: ignore[override]  # typeshed ties the callback's parameters to the arguments; the same below
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self.alive:
            self.world.push(self.world.now, self, handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self.alive:
            self.world.push(when - self._clock_offset + _LATE_S, self, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: `run_handle` skips a cancelled handle when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], *, name: str | None = None, **_: Any
    ) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self, name=name)
        self._tasks.append(task)
        return task

    async def create_connection(  # type: ignore[override]  # the two forms that are used here
        self,
        protocol_factory: Callable[[], asyncio.Protocol],
        host: str,
        port: int,
        *,
        happy_eyeballs_delay: float | None,  # noqa: ARG002 - a host has one address here
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        return await self.network.connect(self, protocol_factory, (host, port))

    def listen(
        self,
        factory: Callable[[], asyncio.Protocol],
        where: HostPort,
        *,
        refusal: Callable[[str], bytes],  # noqa: ARG002 - a simulated process never runs out of descriptors
    ) -> Coroutine[Any, Any, Listener]:
        """Listen as `kvroom.listening.acceptor.listen` does."""
        return self.network.listen(self, factory, where)

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return not self.alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Report an uncaught exception as an error of the code under test, unless its process is dead."""
        if self.alive:
            self.world.violate(f"{self}: {context.get('message')}: {context.get('exception')!r}")

"""Virtual time. Everything that happens is an event of one queue, so that a seed decides the order of everything.

A simulated process is an event loop: its callbacks, timers and tasks run here, one at a time, while the process is
alive and not stopped. Nothing sleeps, nothing is threaded, and the wall clock is never read.
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
"""A run of this many events goes round in circles."""
_LATE_S = 1e-9
"""A timer is never early, whatever the sums of floating point make of two clocks."""


class LawBroken(AssertionError):
    """A law did not hold in a run. The text says which, when and for whom."""


class _Event(NamedTuple):
    at: float
    order: int
    process: Process | None
    handle: asyncio.Handle | Callable[[], object]


class World:
    """The clock, the queue of events, the random choices and the record of one run."""

    def __init__(self, seed: int, *, tracing: bool) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.tracing = tracing
        self.trace: list[str] = []
        self.tally: Counter[str] = Counter()
        """What happened how often: faults, successes, failures by cause."""
        self.names: set[int] = set()
        """Numbers and generations of all rooms: none of them may be found anywhere once the rooms are gone."""
        self.ends: dict[tuple[int, str], tuple[str, float]] = {}
        """How each use of a number ended, on each side, and when."""
        self.events = 0
        self.broken: str | None = None
        self._queue: list[_Event] = []
        self._order = itertools.count()

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Let something happen that no process does."""
        self.push(when, None, call)

    def push(self, when: float, process: Process | None, handle: asyncio.Handle | Callable[[], object]) -> None:
        heapq.heappush(self._queue, _Event(max(when, self.now), next(self._order), process, handle))

    def run(self, until: float) -> None:
        """Let everything happen that is due by then. Raises `LawBroken` at the first broken law."""
        queue = self._queue
        while queue and queue[0].at <= until:
            event = heapq.heappop(queue)
            self.now = event.at
            self.events += 1
            if event.process is not None:
                event.process.run_handle(event.handle)
            else:
                assert not isinstance(event.handle, asyncio.Handle)  # those belong to processes
                event.handle()
            if self.broken is not None:
                raise LawBroken(self.broken)
            if self.events > MAX_EVENTS:
                raise LawBroken(f"no end in sight after {MAX_EVENTS} events")
        self.now = until

    def say(self, who: object, what: str, *about: object) -> None:
        """Add a line to the trace, if anybody reads it."""
        if self.tracing:
            self.trace.append(f"{self.now:9.4f}  {who!s:<12} {what.format(*about)}")

    def violate(self, law: str) -> None:
        """A law is broken; the run ends after this event. Never raises: the code under test may catch what it likes."""
        self.say("LAW BROKEN", "{}", law)
        self.broken = self.broken or f"{law} (at {self.now:.4f} s)"

    def count(self, what: str) -> None:
        self.tally[what] += 1

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Process(asyncio.AbstractEventLoop):
    """One process: an event loop on virtual time, with a clock of its own that began at some other moment."""

    def __init__(self, world: World, network: Network, name: str, address: tuple[str, int]) -> None:
        self.world, self.network = world, network
        self.name, self.address = name, address
        self.machine, self.boot, self.pid = "", "", 0
        """Where it runs, and as which process: two of one boot can look each other up."""
        self.alive, self.stopped = True, False
        self.host_up = True
        """Whether the machine answers for a dead process: it refuses connections and resets old ones."""
        self.cut = False
        """Off the network for good, and does not know."""
        self.stopped_s = 0.0
        """How long it did nothing, in all."""
        self._stopped_at = 0.0
        self._clock_offset = world.random.uniform(0.0, 1000.0)
        self._tasks: list[asyncio.Task[Any]] = []
        self._parked: list[asyncio.Handle | Callable[[], object]] = []

    def __str__(self) -> str:
        return self.name

    # -- what the world does with it ------------------------------------------------------------------------------

    def run_handle(self, handle: asyncio.Handle | Callable[[], object]) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._parked.append(handle)
            return
        asyncio._set_running_loop(self)  # noqa: SLF001 - how a loop says that it runs; the same below
        try:
            if not isinstance(handle, asyncio.Handle):
                handle()
            elif not handle.cancelled():
                handle._run()  # noqa: SLF001
        finally:
            asyncio._set_running_loop(None)  # noqa: SLF001

    def kill(self) -> None:
        """Nothing of it ever runs again. Its tasks are closed, so that they do not complain when they are collected."""
        self.alive = False
        self._parked.clear()
        for task in self._tasks:
            if not task.done():
                task.get_coro().close()
        self._tasks.clear()

    def stop(self) -> None:
        self.stopped, self._stopped_at = True, self.world.now

    def go_on(self) -> None:
        """What came meanwhile is read before timers run, as a loop does."""
        if not self.stopped:
            return
        self.stopped = False
        self.stopped_s += self.world.now - self._stopped_at
        parked, self._parked = self._parked, []
        for handle in sorted(parked, key=lambda handle: isinstance(handle, asyncio.TimerHandle)):
            self.world.push(self.world.now, self, handle)

    # -- what the code in it asks ---------------------------------------------------------------------------------

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
        """Nothing to do: a cancelled handle is passed over when its time comes."""

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
        """An exception that nobody caught is a fault of the code under test, unless its process is dead."""
        if self.alive:
            self.world.violate(f"{self}: {context.get('message')}: {context.get('exception')!r}")

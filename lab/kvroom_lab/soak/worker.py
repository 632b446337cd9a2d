"""One process of a soak: it plays one engine through all rooms, meets the other side at the end, and reports.

It prints lines: `PROGRESS n` from time to time, and then `REPORT` with a `SideReport` as JSON. After that it stays
linked until a signal ends it, because the other side may not have finished.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from kvroom.core.counts import Audit, Counters
from kvroom.core.room import Room
from kvroom.core.sink import Sink
from kvroom.plan import KVLayout
from kvroom.runtime.manager import KVManager
from kvroom.transports import create

from .faults import BreakingTransport
from .leftovers import Leftovers, find_leftovers
from .mix import MAX_PAGES, Kind, Mix
from .pool import SoakPool
from .report import Memory, SideReport, resident_bytes
from .sides import TIMEOUTS, Script, Side, SinkSide, SourceSide

_PATIENCE_S = 60.0
_IDLE_S = 20.0
_WALKS = 3
_BETWEEN_WALKS_S = 0.5
_PAGES_PER_ROOM = 3


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one process. `window` rooms are open at a time; `bootstrap_addr` is the directory."""

    side: str
    mix: Mix
    window: int
    transport: str
    trusted_fabric: bool
    bootstrap_addr: str
    checksum: bool


class SoakManager(KVManager):
    """A manager whose generations can be recognised as those of the soak, wherever they are found."""

    def __init__(self, layout: KVLayout, mix: Mix, **options: object) -> None:
        self._mix = mix
        self._minted = 0
        super().__init__(layout, **options)  # type: ignore[arg-type]  # passed on as they came

    def new_generation(self, room: Room) -> int | None:
        """Return the next generation in order, for a sink. Runs in the loop thread."""
        if not isinstance(room, Sink):
            return None
        self._minted += 1
        return self._mix.generation(self._minted)


class Step(NamedTuple):
    """A script to be played.

    `number` is the number of rooms begun with it, or 0 for a meeting, which is none of the rooms. With `alone`, no
    other script runs beside it.
    """

    number: int
    pages: int
    script: Script
    alone: bool = False


class Player:
    """Plays a side's scripts, `window` of them at a time, and measures the memory in between."""

    def __init__(self, task: Task, changed: threading.Event, say: Callable[[str], None]) -> None:
        self._task = task
        self._changed = changed
        self._say = say
        self.memory = Memory(0, [], 0)
        self.unfinished = 0

    def play(self, side: Side) -> None:
        """Play all rooms. Return when every script has ended, or when none has ended for `_PATIENCE_S`."""
        self.memory.start = resident_bytes()
        steps = self._programme(side)
        step: Step | None = next(steps)
        running: list[Script] = []
        alone, moved_s = False, time.monotonic()
        while step is not None or running:
            self._changed.clear()
            before = len(running)
            running = [script for script in running if _goes_on(script)]
            moved = len(running) < before
            while step is not None and self._may_begin(step, alone, running, side):
                if _goes_on(step.script):
                    running.append(step.script)
                self._measure(step)
                alone, moved, step = step.alone, True, next(steps, None)
            if moved:
                moved_s = time.monotonic()
            elif time.monotonic() - moved_s > _PATIENCE_S:
                break
            else:
                self._changed.wait(1.0)  # with a limit, because some scripts also wait for a time
        self.memory.end = resident_bytes()
        self.unfinished = len(running) + (step is not None) + sum(1 for _ in steps)

    def _programme(self, side: Side) -> Iterator[Step]:
        """Yield all steps. The sides meet after each cut, so that both continue with the same room, and at the end."""
        mix = self._task.mix
        for index in range(mix.rooms):
            request = mix.request(index)
            yield Step(index + 1, request.pages, side.script(request))
            if request.kind is Kind.LINK_CUT:
                yield Step(0, 1, side.meet(mix.meeting(index + 1)), alone=True)
        yield Step(0, 1, side.meet(mix.meeting(mix.rooms)), alone=True)

    def _may_begin(self, step: Step, alone: bool, running: Sequence[Script], side: Side) -> bool:
        if running and (alone or step.alone):
            return False
        return len(running) < self._task.window and side.pool.free >= step.pages

    def _measure(self, step: Step) -> None:
        begun, total = step.number, self._task.mix.rooms
        if not begun:
            return
        if begun * 10 // total > (begun - 1) * 10 // total:
            self.memory.tenths.append(resident_bytes())
        if begun * 100 // total > (begun - 1) * 100 // total:
            self._say(f"PROGRESS {begun}")


def run_worker(task: Task) -> None:
    """Play one side in this process, and print its report."""
    logging.getLogger("kvroom").setLevel(logging.CRITICAL)  # rooms fail here by the thousand, as intended
    changed = threading.Event()
    with contextlib.ExitStack() as stack:
        pool = SoakPool(max(task.window * _PAGES_PER_ROOM, MAX_PAGES))
        stack.callback(pool.close)
        side = open_side(task, pool, changed, stack)
        player = Player(task, changed, _say)
        begun_s = time.monotonic()
        player.play(side)
        seconds = time.monotonic() - begun_s
        _say("REPORT " + msgspec.json.encode(report(side, player, task.mix, seconds)).decode())
        signal.pause()


def open_side(task: Task, pool: SoakPool, changed: threading.Event, stack: contextlib.ExitStack) -> Side:
    """Return the engine that the task names; `stack` closes its manager."""
    transport = BreakingTransport(create(task.transport, trusted_fabric=task.trusted_fabric), pool.layout)
    manager = SoakManager(
        pool.layout, task.mix, transport=transport, timeouts=TIMEOUTS, checksum=task.checksum, on_change=changed.set,
        register_with=task.bootstrap_addr if task.side == "source" else None,
    )  # fmt: skip
    stack.enter_context(manager)
    if task.side == "source":
        return SourceSide(manager, pool, transport)
    return SinkSide(manager, pool, task.bootstrap_addr)


def report(side: Side, player: Player, mix: Mix, seconds: float, idle_s: float = _IDLE_S) -> SideReport:
    """Return the result, with all that is left. Both sides must have ended all their rooms."""
    manager = side.manager
    manager.wait_idle(idle_s)
    side.pool.check_rest()
    audit, counters = manager.audit(), manager.counters()
    how = ", ".join(manager.peers().values())
    return SideReport(
        side=side.name,
        transport=how,
        opened=side.opened,
        succeeded=side.succeeded,
        failed=side.failed,
        failed_by_cause={cause.value: count for cause, count in counters.failed_by_cause.items()},
        unexpected=side.unexpected,
        examples=side.examples,
        excused=side.excused,
        unfinished=player.unfinished,
        checked_bytes=side.pool.checked_bytes,
        wrong_bytes=side.pool.wrong_bytes,
        rooms_left=audit.sources + audit.sinks + audit.early_arrivals,
        pages_left=side.pool.total - side.pool.free,
        leftovers=_leftovers(mix),
        memory=player.memory,
        seconds=seconds,
        counters=_numbers(counters),
        audit=_numbers(audit),
    )


def _leftovers(mix: Mix) -> Leftovers:
    """Return what several walks find: a reference that a thread holds for a moment is gone by the next walk."""
    found = find_leftovers(mix.owns)
    for _ in range(_WALKS - 1):
        if not found.entries and not found.alive:
            break
        time.sleep(_BETWEEN_WALKS_S)
        found = find_leftovers(mix.owns)
    return found


def _numbers(counts: Audit | Counters) -> dict[str, int]:
    fields = ((name, getattr(counts, name)) for name in counts.__struct_fields__)
    return {name: value for name, value in fields if isinstance(value, int)}


def _goes_on(script: Script) -> bool:
    try:
        next(script)
    except StopIteration:
        return False
    return True


def _say(line: str) -> None:
    print(line, flush=True)

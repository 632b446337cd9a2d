"""Leaks and wrong bytes that are planted in a small soak.

This runs in a separate process, because the search for leaks walks every object of the process, and torch has many.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager
from kvroom.core.settings import Timeouts
from kvroom.core.source import Source
from kvroom_lab.soak.leftovers import Leftovers, find_leftovers
from kvroom_lab.soak.mix import Mix
from kvroom_lab.soak.pool import SoakPool
from kvroom_lab.soak.report import SideReport
from kvroom_lab.soak.sides import Side
from kvroom_lab.soak.worker import Player, Task, open_side, report

MIX = Mix(rooms=300, seed=7, faults=0.2)
OTHER = Mix(rooms=10, seed=99)


class Soak:
    """Both sides of a soak in this process, over `tcp`. The constructor returns when all of its rooms have ended."""

    def __init__(self, stack: contextlib.ExitStack, mix: Mix) -> None:
        logging.getLogger("kvroom").setLevel(logging.CRITICAL)
        addr = stack.enter_context(KVBootstrapServer()).address
        self.players: list[tuple[Side, Player]] = []
        for name in ("source", "sink"):
            task = Task(
                side=name, mix=mix, window=16, transport="tcp", trusted_fabric=False, bootstrap_addr=addr, checksum=True
            )
            changed = threading.Event()
            side = open_side(task, SoakPool(48), changed, stack)
            self.players.append((side, Player(task, changed, lambda _: None)))
        threads = [threading.Thread(target=player.play, args=(side,)) for side, player in self.players]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def reports(self) -> list[SideReport]:
        return [report(side, player, MIX, 1.0, idle_s=1) for side, player in self.players]


@functools.cache
def soak() -> Soak:
    """Run the soak once for all tests. Its managers stay open until the process ends."""
    return Soak(contextlib.ExitStack(), MIX)


def with_nothing() -> list[SideReport]:
    return soak().reports()


def with_a_page_kept() -> list[SideReport]:
    pool = soak().players[1][0].pool
    kept = pool.take(1)
    reports = soak().reports()
    pool.give(kept)
    return reports


def with_a_room_kept() -> list[SideReport]:
    kept = soak().players[0][0].manager.sender(MIX.number(5), identity=PROMPT)
    kept.send([0], stop=1)
    reports = soak().reports()
    kept.clear()
    return reports


def with_wrong_bytes() -> list[SideReport]:
    """Plant two wrong bytes in a page that no room holds."""
    pool = soak().players[1][0].pool
    pool._pages[3, 0, 0, 0, 0, 0] ^= 0xFF00FF
    reports = soak().reports()
    pool._pages[3, 0, 0, 0, 0, 0] ^= 0xFF00FF
    pool.wrong_bytes = 0
    return reports


PLACES: dict[str, Callable[[KVManager], object]] = {
    "SoakManager": lambda manager: manager,
    "Driver": lambda manager: manager.driver,
    "RoomTable": lambda manager: manager.driver.table,
    "BreakingTransport": lambda manager: manager.transport,
    "Links": lambda manager: manager._links,
    "Connection": lambda manager: next(iter(manager._links._links.values())),
}


def with_a_leak(place: str) -> list[SideReport]:
    holder = PLACES[place](soak().players[0][0].manager)
    holder.planted = {MIX.number(3): 1}  # type: ignore[attr-defined]
    reports = soak().reports()
    del holder.planted  # type: ignore[attr-defined]
    return reports


class Box:
    """An object with an attribute that can hold anything."""

    kept: object = None


box = Box()


def in_a_generator(number: int) -> Iterator[int]:
    def wait(kept: int) -> Iterator[int]:
        yield 0
        yield kept

    waiting = wait(number)
    next(waiting)
    return waiting


HOLDERS: dict[str, Callable[[int], object]] = {
    "dict by room": lambda number: {number: 0},
    "dict of rooms": lambda number: {0: number},
    "OrderedDict": lambda number: OrderedDict({number: 0}),
    "set": lambda number: {number},
    "list": lambda number: [number],
    "deque": lambda number: deque([number]),
    "key of two": lambda number: {("sink", number): 0},
    "list in a dict": lambda number: {0: [[number]]},
    "text": lambda number: {f"room {number}": 0},
    "closure": lambda number: lambda: number,
    "waiting generator": in_a_generator,
}


def held_by(holder: str, what: str) -> Leftovers:
    """Return what the walk finds if an object outside the soak's own parts holds a room number or a generation."""
    box.kept = HOLDERS[holder](getattr(OTHER, what)(5))
    found = find_leftovers(OTHER.owns)
    box.kept = None
    return found


def held_by_a_running_function() -> Leftovers:
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        last = OTHER.number(4)
        held.set()
        released.wait(60)
        assert OTHER.owns(last)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    found = find_leftovers(OTHER.owns)
    released.set()
    thread.join()
    return found


def rooms_and_handles_alive() -> list[int]:
    """Return the walk's count with a room, with a handle that has a room, and with neither; none has a number."""
    counts = []
    box.kept = Source(Timeouts())
    counts.append(find_leftovers(OTHER.owns).alive)
    box.kept = soak().players[0][0].manager.sender()
    counts.append(find_leftovers(OTHER.owns).alive)
    box.kept = None
    gc.collect()
    counts.append(find_leftovers(OTHER.owns).alive)
    return counts

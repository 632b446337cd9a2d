"""The cost of rooms: clearing one among many, losing a peer among many, memory per open room.

    clear     one room of a table with 1,000,000 rooms, against one of a table with 100     goal: ratio < 1.5
    peer      losing a peer that has k rooms, 1,000,000 rooms of others, against 1,000      goal: ratio < 1.5
    memory    resident bytes per open room: the table alone, and a manager with its handles

The large and the small table take turns within one run, so that the load of the machine is the same for both. Clearing
is timed for a room that was opened immediately before ("in cache"), and after the processor's caches were filled with
other data ("out of cache"). Without the second case the small table would win by its size: a hundred rooms fit in the
caches, and a million do not.

Run: python bench/cost.py [--rooms 1000000]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from kvroom import KVManager, Limits, Timeouts
from kvroom.core import inputs as asked
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import Done, Peer
from kvroom.core.room import Room
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom_lab.pools import TestPool

FEW = 100
OTHERS = 1000
ROUNDS = 2001
COLD_ROUNDS = 201
CACHE_BYTES = 64 << 20
PEER_ROUNDS = 21
CLEARS_AT_ONCE = 200
NEVER = Timeouts(bootstrap_s=1e6, waiting_s=1e6, stall_s=1e6, drain_s=1e6)
LIMITS = Limits(rooms=1 << 21)
PEERS = [Peer(f"10.0.0.{host}:9000", host) for host in range(1, 65)]
LOST = Peer("10.0.1.1:9000", 1 << 20)
PROMPT = KVIdentity.of(range(16))


class World:
    """One room table, and constructors for rooms in it. No number or generation is used twice."""

    def __init__(self) -> None:
        self.table = RoomTable(NEVER, LIMITS)
        self.numbers = iter(range(1 << 62))
        self.seqs = iter(range(1, 1 << 62))
        for peer in [*PEERS, LOST]:
            self.table.peer_up(peer, 0.0)

    def expected(self) -> Source:
        """Open a source that waits for its offer."""
        room = Source(NEVER, identity=PROMPT)
        self.table.open(room, next(self.numbers), None, 0.0)
        self.table.take_effects()
        return room

    def offered(self, peer: Peer | None = None) -> Sink:
        """Open a sink that waits for its bytes."""
        room, number = Sink(NEVER, identity=PROMPT), next(self.numbers)
        self.table.open(room, number, number ^ 0x9E3779B97F4A7C15, 0.0)
        self.table.feed(room, asked.Resolved(sources=(peer or PEERS[number % len(PEERS)],)), 0.0)
        self.table.feed(
            room, asked.OfferPages(pages=(number % 4096,), start=0, stop=16, nbytes=8192, grant=b"grant"), 0.0
        )
        self.table.take_effects()
        return room

    def landed(self) -> Sink:
        """Open a sink that has all of its bytes."""
        room = self.offered()
        peer = next(iter(room.sources))
        assert room.number is not None
        assert room.generation is not None
        self.table.receive(
            peer,
            next(self.seqs),
            Done(room=room.number, generation=room.generation, tokens=16, nbytes=8192, identity=PROMPT),
            0.0,
        )
        self.table.take_effects()
        return room

    def clear(self, room: Room) -> None:
        """Clear a room as the driver does. A sink with an offer is proven drained immediately, as with `tcp`."""
        self.table.feed(room, asked.Clear(), 0.0)
        if not room.gone:
            self.table.feed(room, asked.Revoked(), 0.0)
        self.table.take_effects()


Maker = Callable[[World], Room]
Kept = dict[str, list[list[Room]]]
"""The rooms of each world, by kind."""
MAKERS: dict[str, Maker] = {
    "source, no offer yet": World.expected,
    "sink, offered": World.offered,
    "sink, all landed": World.landed,
}


def timed(call: Callable[[], object]) -> int:
    """Return the nanoseconds that a call takes."""
    begun = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - begun


def clear_times(worlds: list[World], kept: list[list[Room]], make: Maker, *, cold: bool) -> list[float]:
    """Return the median microseconds of one clear in each world, in turns. A new room replaces every cleared one."""
    draws = random.Random(1)
    elsewhere = np.ones(CACHE_BYTES, np.uint8)
    taken: list[list[int]] = [[] for _ in worlds]
    for _ in range(COLD_ROUNDS if cold else ROUNDS):
        for world, rooms, times in zip(worlds, kept, taken, strict=True):
            place = draws.randrange(len(rooms))
            if cold:
                elsewhere += 1
            else:
                world.clear(rooms[place])
                rooms[place] = make(world)
            times.append(timed(lambda w=world, room=rooms[place]: w.clear(room)))  # type: ignore[misc]
            assert rooms[place].gone
            rooms[place] = make(world)
    return [statistics.median(times) / 1e3 for times in taken]


def clearing(small: World, large: World, kept: Kept) -> Iterator[str]:
    for name, make in MAKERS.items():
        for cold in (False, True):
            few, many = clear_times([small, large], kept[name], make, cold=cold)
            state = "out of cache" if cold else "in cache"
            yield (
                f"  {name:<22} {state:<12} {few:6.2f} us of {len(small.table):,}, {many:6.2f} us of "
                f"{len(large.table):,}: {many / few:.2f}"
            )


def lose(world: World, count: int) -> int:
    """Return the nanoseconds to lose a peer with `count` rooms, and restore the state before."""
    rooms = [world.offered(LOST) for _ in range(count)]
    taken = timed(lambda: lose_now(world.table))
    world.table.fenced(LOST, 0.0)
    for room in rooms:
        world.clear(room)
        assert room.gone
    world.table.peer_up(LOST, 0.0)
    return taken


def lose_now(table: RoomTable) -> None:
    table.peer_lost(LOST, "it ended", 0.0)
    table.take_effects()


def losing(large: World) -> Iterator[str]:
    small = World()
    others = [small.offered() for _ in range(OTHERS)]
    for own in (10, 1000):
        pairs = [(lose(small, own), lose(large, own)) for _ in range(PEER_ROUNDS)]
        few, many = (statistics.median(times) / 1e3 for times in zip(*pairs, strict=True))
        yield (
            f"  a peer with {own:>5,} rooms  {few:9.1f} us beside {OTHERS:,} others, {many:9.1f} us beside "
            f"{len(large.table):,}: {many / few:.2f}"
        )
    assert not any(room.gone for room in others)


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table_memory(name: str, count: int) -> str:
    """Measure memory per room. It needs a new process, where no freed memory can be used again."""
    world = World()
    MAKERS[name](world)
    before = resident()
    rooms = [MAKERS[name](world) for _ in range(count)]
    return f"  table, {name:<22} {(resident() - before) / len(rooms):7,.0f} bytes per room"


def manager_cost(count: int) -> list[str]:
    """Measure senders that wait for their offers, in two managers of this process, which has to be new as well."""
    gc.disable()
    pool = TestPool()
    with manager(pool) as small, manager(pool) as large:
        few = [small.sender(number, identity=PROMPT) for number in range(FEW)]
        large.sender(1 << 40, identity=PROMPT).clear()
        large.counters()
        before = resident()
        many = [large.sender(number, identity=PROMPT) for number in range(count)]
        large.counters()  # returns when all rooms are open
        memory = f"  manager and handle, source    {(resident() - before) / len(many):7,.0f} bytes per room"
        taken: list[list[float]] = [[], []]
        for turn in range(101):
            for home, times in zip((small, large), taken, strict=True):
                times.append(clear_some(home, (1 << 41) + turn * CLEARS_AT_ONCE))
        one, other = (statistics.median(times) * 1e6 for times in taken)
        clears = f"  clear() of a handle, carried out  {one:.1f} us of {len(few)}, {other:.1f} us of {len(many):,}: "
    pool.close()
    return [memory, f"{clears}{other / one:.2f}"]


def manager(pool: TestPool) -> KVManager:
    return KVManager(pool.layout, transport="memory", timeouts=NEVER, limits=LIMITS)


def clear_some(home: KVManager, first: int) -> float:
    """Return the seconds per clear, until it is carried out, of rooms that were opened immediately before."""
    senders = [home.sender(first + i, identity=PROMPT) for i in range(CLEARS_AT_ONCE)]
    home.counters()
    begun = time.perf_counter()
    for sender in senders:
        sender.clear()
    home.counters()  # returns when all clears are carried out
    return (time.perf_counter() - begun) / CLEARS_AT_ONCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rooms", type=int, default=1_000_000)
    parser.add_argument("--manager-rooms", type=int, default=200_000)
    options = parser.parse_args()
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    with fresh:
        print("memory, and clear() through a manager")
        for name in MAKERS:
            print(fresh.apply(table_memory, (name, options.manager_rooms)), flush=True)
        print("\n".join(fresh.apply(manager_cost, (options.manager_rooms,))), flush=True)
    gc.disable()  # a collection visits every object of the process, and its time would count as that of one clear
    small, large = World(), World()
    few, many = -(-FEW // len(MAKERS)), -(-options.rooms // len(MAKERS))
    kept = {
        name: [[make(small) for _ in range(few)], [make(large) for _ in range(many)]] for name, make in MAKERS.items()
    }
    print("clear() of one room of a table")
    for line in clearing(small, large, kept):
        print(line, flush=True)
    print("losing a peer")
    for line in losing(large):
        print(line, flush=True)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

"""The clean end: everything is cleared and every transfer ends; then nothing may be left (law 2).

A link comes up again only where a driver would redial, and a room repeats its question only when its timer expires.
"""

from __future__ import annotations

import msgspec

from kvroom.core import inputs as asked

from .managers import owner_of
from .world import World


def wind_up(world: World) -> None:
    """Do one round in place: clear, end transfers, give every possible proof, deliver, expire a timer per manager."""
    _clear(world)
    for index, peer in world.unnoticed():
        world.notice(index, peer)
    for flight in sorted(world.flights):
        if world.alive(flight.source):
            world.break_off(flight)
    for index, peer in sorted(world.fencing):
        world.fence(index, peer)
    for peer, index in sorted(world.wire):
        while items := world.wire.get((peer, index)):
            world.deliver(peer, index, items[0], False)
    _let_time_pass(world)


def _let_time_pass(world: World) -> None:
    world.redials = frozenset()
    for index, manager in enumerate(world.managers):
        if manager is not None and manager.table.deadline() is not None:
            world.happen(index, ("expire",))
    for index, peer in sorted(world.redials):
        if world.alive(peer) and not world.linked(index, world.index_of(peer)):
            world.connect(world.index_of(peer), index)


def _clear(world: World) -> None:
    for index, manager in enumerate(world.managers):
        for room in manager.rooms if manager else ():
            if not room.cleared:
                world.happen(index, ("ask", owner_of(room), asked.Clear()))


def is_clean(world: World) -> bool:
    """Return whether no room is left and every room has released its pages.

    `managers` checks that none does so twice.
    """
    managers = [manager for manager in world.managers if manager is not None]
    if any(len(it.table) or it.table.deadline() is not None or len(it.released) < it.opened for it in managers):
        return False
    return all(manager.table.audit().empty for manager in managers)


def left(world: World) -> str:
    """Return what the managers still keep, for the message of a broken law."""
    kept = []
    for manager in world.managers:
        if manager is not None:
            audit = msgspec.structs.asdict(manager.table.audit())
            kept += [f"{manager.me} keeps {n} {name}" for name, n in audit.items() if n]
            if len(manager.released) < manager.opened:
                kept.append(
                    f"{manager.me} opened {manager.opened} rooms and released pages {len(manager.released)} times"
                )
    return ", ".join(kept)

"""Visit every state that one source and one sink can reach over a wire that drops, repeats, reorders and delays.

A `World` is two room tables, the messages between them, the transfers in flight and what the engines may still ask.
`explore` walks it breadth first, so a broken law is reported with its shortest trace. In every state it checks that

- no page is released while a transfer may still write into it or read from it (law 6), and each release comes once;
- success means that every token has landed (law 8);
- phases went forward (law 4), the table's own books agree, and nothing that is gone remains (laws 1 and 2);
- with both peers silent from here on, every room still ends (law 7);
- with both peers well again from here on, everything can be cleared and the audit is empty (law 2).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.messages import Message, Peer
from kvroom.core.phases import KVPoll, Phase
from kvroom.core.room import Room
from kvroom.core.rooms import Audit, RoomTable
from kvroom.core.settings import Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source

ROOM = 7
PREFILL, DECODE = Peer("prefill", 1), Peer("decode", 2)
_ORDER = {phase: rank for rank, phase in enumerate(Phase)}


class LawBroken(AssertionError):
    """A law does not hold in some reachable state; the text is the law and the shortest trace to that state."""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """How far a world may go, and what may happen in it."""

    enforcing: bool = False  # the sink's transport does the writing, so revoking a grant is proof (`tcp`)
    chunks: int = 2  # that the prefill engine sends, each of one token
    openings: int = 1  # how often each side may open the room, one after the other
    expiries: int = 2  # deadlines that may run out on each side
    link_losses: int = 1
    repeats: bool = True
    drops: bool = True
    aborts: bool = True  # besides clearing, which aborts too


class Machines(NamedTuple):
    """The code under test; a planted bug replaces one of these."""

    table: type[RoomTable] = RoomTable
    source: type[Source] = Source
    sink: type[Sink] = Sink


class Flight(NamedTuple):
    """A transfer under way: it writes tokens [start, stop) of this generation's offer."""

    generation: int
    transfer: int
    start: int
    stop: int


class Side:
    """One manager: its table, its clock, what its engine may still do, and what it has said but the peer not read."""

    def __init__(self, table: RoomTable, me: Peer) -> None:
        self.table, self.me = table, me
        self.now = 0.0
        self.opened = self.expired = 0
        self.next_seq = 1
        self.wire: frozenset[tuple[int, Message]] = frozenset()

    def copy(self) -> Side:
        twin = Side(self.table.copy(), self.me)
        twin.now, twin.opened, twin.expired = self.now, self.opened, self.expired
        twin.next_seq, twin.wire = self.next_seq, self.wire
        return twin

    def rooms(self) -> list[Room]:
        return list(self.table)


Action = Callable[["World"], None]


class World:
    """The whole of it: two sides, a link that may be down, flights, and what has been released and has landed."""

    def __init__(self, scope: Scope, machines: Machines) -> None:
        self.scope, self.machines = scope, machines
        timeouts = Timeouts(bootstrap_s=1, waiting_s=1, stall_s=1, drain_s=1)
        self.prefill = Side(machines.table(timeouts), PREFILL)
        self.decode = Side(machines.table(timeouts), DECODE)
        self.link_up = False
        self.losses = 0
        self.flights: frozenset[Flight] = frozenset()
        self.landed: frozenset[Flight] = frozenset()
        self.revoked: frozenset[int] = frozenset()
        self.released: frozenset[int] = frozenset()  # generations whose sink pages are the engine's again
        self.trail: tuple[str, ...] = ()
        self.connect()

    def copy(self) -> World:
        twin = object.__new__(World)
        twin.__dict__.update(self.__dict__)
        twin.prefill, twin.decode = self.prefill.copy(), self.decode.copy()
        return twin

    def key(self) -> object:
        """Two worlds with equal keys behave alike: times and numbers are replaced by their order."""
        return (_side_key(self.prefill), _side_key(self.decode), _wire_key(self.prefill, self.decode),
                _wire_key(self.decode, self.prefill), self.link_up, self.losses, self.flights, self.landed,
                self.revoked, self.released)  # fmt: skip

    # -- what may happen next -------------------------------------------------------------------------------------

    def actions(self) -> Iterator[tuple[str, Action]]:
        yield from self._engine_actions()
        yield from self._wire_actions()
        for flight in sorted(self.flights):
            if flight.generation not in self.revoked:
                yield f"{flight} lands", lambda w, f=flight: w.land(f)  # type: ignore[misc]
            yield f"{flight} breaks", lambda w, f=flight: w.break_off(f)  # type: ignore[misc]
        if self.link_up and self.losses < self.scope.link_losses:
            yield "the link is lost", World.disconnect
        if not self.link_up:
            yield "the link is up again", World.connect
        for name in ("prefill", "decode"):
            side: Side = getattr(self, name)
            if side.expired < self.scope.expiries and side.table.deadline() is not None:
                yield f"a deadline runs out on the {name} side", lambda w, n=name: w.expire(n)  # type: ignore[misc]

    def _engine_actions(self) -> Iterator[tuple[str, Action]]:
        for name in ("prefill", "decode"):
            side: Side = getattr(self, name)
            rooms = [room for room in side.rooms() if not room.cleared]
            if not rooms and side.opened < self.scope.openings:
                yield f"{name} opens the room", lambda w, n=name: w.open(n)  # type: ignore[misc]
            for room in rooms:
                if self.scope.aborts and room.status not in (KVPoll.Failed, KVPoll.Success):
                    yield f"{name} aborts", _ask(name, asked.GiveUp("the engine's wish"))
                yield f"{name} clears", _ask(name, asked.Clear())
                yield from _wishes(name, room, self.scope.chunks, self.link_up)

    def _wire_actions(self) -> Iterator[tuple[str, Action]]:
        for name in ("prefill", "decode"):
            side: Side = getattr(self, name)
            for item in sorted(side.wire, key=lambda it: it[0]):
                yield f"{name} says {item}", lambda w, n=name, i=item: w.deliver(n, i, keep=False)  # type: ignore[misc]
                if self.scope.drops:
                    yield f"lost: {item}", lambda w, n=name, i=item: w.lose(n, i)  # type: ignore[misc]
                if self.scope.repeats:
                    yield f"twice: {item}", lambda w, n=name, i=item: w.deliver(n, i, keep=True)  # type: ignore[misc]

    # -- what happens ---------------------------------------------------------------------------------------------

    def open(self, name: str) -> None:
        side = self._side(name)
        side.opened += 1
        if side is self.prefill:
            side.table.open(self.machines.source(side.table.timeouts, side.opened), ROOM, None, side.now)
        else:
            side.table.open(self.machines.sink(side.table.timeouts, side.opened), ROOM, 100 + side.opened, side.now)
        self.settle()

    def ask(self, name: str, what: asked.Input) -> None:
        side = self._side(name)
        room = next(room for room in side.rooms() if not room.cleared)
        side.table.feed(room, what, side.now)
        self.settle()

    def deliver(self, name: str, item: tuple[int, Message], *, keep: bool) -> None:
        sender = self._side(name)
        receiver = self.decode if sender is self.prefill else self.prefill
        if not keep:
            sender.wire -= {item}
        receiver.table.receive(sender.me, *item, receiver.now)
        self.settle()

    def lose(self, name: str, item: tuple[int, Message]) -> None:
        self._side(name).wire -= {item}

    def land(self, flight: Flight) -> None:
        self.flights -= {flight}
        self.landed |= {flight}
        self._report(flight, asked.Landed(flight.transfer, flight.stop - flight.start))

    def break_off(self, flight: Flight) -> None:
        self.flights -= {flight}
        revoked = flight.generation in self.revoked
        self._report(flight, asked.Broke(flight.transfer, "the transport's words", revoked))

    def _report(self, flight: Flight, what: asked.Input) -> None:
        side = self.prefill
        owners = [room for room in side.rooms() if room.generation == flight.generation]
        if not owners:
            raise LawBroken(f"law 6: {flight} is under way and no source room knows of it")
        side.table.feed(owners[0], what, side.now)
        self.settle()

    def expire(self, name: str) -> None:
        side = self._side(name)
        deadline = side.table.deadline()
        assert deadline is not None  # the action is offered only then
        side.expired += 1
        side.now = max(side.now, deadline)
        side.table.expire(side.now)
        self.settle()

    def connect(self) -> None:
        self.link_up = True
        self.prefill.table.peer_up(DECODE, self.prefill.now)
        self.decode.table.peer_up(PREFILL, self.decode.now)
        self.settle()

    def disconnect(self) -> None:
        self.link_up = False
        self.losses += 1
        self.prefill.wire = self.decode.wire = frozenset()
        self.prefill.table.peer_lost(DECODE, "the connection closed", self.prefill.now)
        self.decode.table.peer_lost(PREFILL, "the connection closed", self.decode.now)
        self.settle()

    def settle(self) -> None:
        """Carry out what the tables want done, as the driver does."""
        for side in (self.prefill, self.decode):
            while todo := side.table.take_effects():
                for room, effect in todo:
                    self._perform(side, room, effect)

    def _perform(self, side: Side, room: Room | None, effect: do.Effect) -> None:
        if isinstance(effect, do.Send) and self.link_up:
            side.wire |= {(side.next_seq, effect.message)}
            side.next_seq += 1
        elif isinstance(effect, do.Submit):
            self.flights |= {Flight(effect.offer.generation, effect.transfer, effect.start, effect.stop)}
        elif isinstance(effect, do.ReleasePages):
            assert room is not None  # only a room releases
            self._release(side, room)
        elif isinstance(effect, do.Revoke) and self.scope.enforcing:
            assert room is not None
            assert room.generation is not None
            self.revoked |= {room.generation}
            side.table.feed(room, asked.Revoked(), side.now)

    def _release(self, side: Side, room: Room) -> None:
        generation = room.generation
        if side is self.prefill:
            if any(flight.generation == generation for flight in self.flights):
                raise LawBroken("law 6: the source releases pages that a transfer still reads")
        elif generation is not None:
            if generation in self.released:
                raise LawBroken("law 6: the sink releases its pages twice")
            self.released |= {generation}

    def _side(self, name: str) -> Side:
        side: Side = getattr(self, name)
        return side

    # -- the laws -------------------------------------------------------------------------------------------------

    def check(self, before: World) -> None:
        for flight in self.flights:
            if flight.generation in self.released and flight.generation not in self.revoked:
                raise LawBroken(f"law 6: the sink released pages that {flight} still writes")
        for side, old in ((self.prefill, before.prefill), (self.decode, before.decode)):
            if side.table.audit().inconsistent:
                raise LawBroken(f"law 1: the books of {side.me} disagree with its rooms: {side.table.audit()}")
            phases = {(room.side, room.owner): room.phase for room in old.rooms()}
            for room in side.rooms():
                if room.gone:
                    raise LawBroken(f"law 2: a cleared room in {room.phase.name} remains in the table of {side.me}")
                if _ORDER[room.phase] < _ORDER[phases.get((room.side, room.owner), Phase.NEW)]:
                    raise LawBroken(f"law 4: {room.phase.name} came after a later phase")
                if room.phase is Phase.LANDED and not self._whole(room.generation):
                    raise LawBroken("law 8: the sink reports success, and tokens are missing")

    def _whole(self, generation: int | None) -> bool:
        landed = {t for f in self.landed if f.generation == generation for t in range(f.start, f.stop)}
        return landed == set(range(self.scope.chunks))

    def check_silent_end(self) -> None:
        """Law 7: nobody says anything any more; deadlines alone end every room."""
        for side in (self.prefill.copy(), self.decode.copy()):
            for _ in range(6):
                deadline = side.table.deadline()
                if deadline is not None:
                    side.table.expire(deadline)
            if any(room.status not in (KVPoll.Failed, KVPoll.Success) for room in side.rooms()):
                raise LawBroken(f"law 7: with its peer silent, a room of {side.me} never ends")

    def check_clean_end(self) -> None:
        """Law 2: both sides clear, everything under way comes to its end, messages arrive: nothing is left."""
        world = self.copy()
        if not world.link_up:
            world.connect()
        for _ in range(6):
            world.wind_up()
        for side in (world.prefill, world.decode):
            if not side.table.audit().empty:
                raise LawBroken(f"law 2: after both sides cleared, {side.me} keeps {_left(side.table.audit())}")

    def wind_up(self) -> None:
        """One round of coming to an end: clear all rooms, end all flights, deliver all messages, let one timer run."""
        names = ("prefill", "decode")
        for name in names:
            side = self._side(name)
            for room in side.rooms():
                side.table.feed(room, asked.Clear(), side.now)
            self.settle()
            for flight in sorted(self.flights):
                self.break_off(flight)
            for item in sorted(side.wire, key=lambda it: it[0]):
                self.deliver(name, item, keep=False)
        for name in names:
            if self._side(name).table.deadline() is not None:
                self.expire(name)


def _ask(name: str, what: asked.Input) -> Action:
    return lambda world: world.ask(name, what)


def _wishes(name: str, room: Room, chunks: int, link_up: bool) -> Iterator[tuple[str, Action]]:
    """What an engine that plays by the rules may ask of a room; that it has failed may be unnoticed yet."""
    if isinstance(room, Sink):
        if room.phase is Phase.ALLOCATED and not room.sources and link_up:
            yield "decode finds its source", _ask(name, asked.Resolved((PREFILL,)))
        if room.phase is Phase.ALLOCATED and room.offer is None:
            yield "decode offers pages", _ask(name, asked.OfferPages(tuple(range(4, 4 + chunks)), 0, chunks, chunks))
    elif isinstance(room, Source) and len(room.chunks) < chunks and room.phase is not Phase.SENT:
        n = len(room.chunks)
        yield f"prefill sends chunk {n}", _ask(name, asked.SendPages((n,), n + 1, last=n + 1 == chunks))


def _side_key(side: Side) -> object:
    timers = sorted({room.timer.at for room in side.rooms() if room.timer} | {side.table.deadline() or 0.0})
    return (side.opened, side.expired, side.table.early_messages(), side.table.deadline() is None,
            frozenset(_room_key(room, timers) for room in side.rooms()))  # fmt: skip


def _room_key(room: Room, timers: list[float]) -> object:
    timer = room.timer and (room.timer.kind, timers.index(room.timer.at))
    own: object
    if isinstance(room, Sink):
        own = (room.sources, room.writers, room.missing, room.offer, room.nbytes)
    else:
        assert isinstance(room, Source)
        own = (room.peer, len(room.chunks), room.submitted, room.in_flight, room.revoked, room.told)
    return (room.side, room.generation, room.phase, room.cleared, timer, own)


def _wire_key(sender: Side, receiver: Side) -> object:
    """The messages that can still do something, in order. The table ignores those that were overtaken."""
    fresh = [item for item in sender.wire if not receiver.table.overtaken(sender.me, item[0])]
    return tuple(message for _, message in sorted(fresh, key=lambda item: item[0]))


def _left(audit: Audit) -> str:
    return ", ".join(f"{n} {name}" for name, n in msgspec.structs.asdict(audit).items() if n)


class Explored(NamedTuple):
    """How much was visited: distinct states, steps between them, seconds."""

    states: int
    steps: int
    seconds: float


def explore(scope: Scope | None = None, machines: Machines | None = None, *, limit: int = 2_000_000) -> Explored:
    """Visit every reachable state. Raises `LawBroken` with the shortest trace, or if there are over `limit` states."""
    begun = time.perf_counter()
    start = World(scope or Scope(), machines or Machines())
    seen, todo, steps = {start.key()}, deque([start]), 0
    while todo:
        world = todo.popleft()
        for name, act in world.actions():
            after = world.copy()
            after.trail = (*world.trail, name)
            steps += 1
            try:
                act(after)
                key = after.key()
                if key in seen:
                    continue
                after.check(world)
                after.check_silent_end()
                after.check_clean_end()
            except LawBroken as broken:
                raise LawBroken("\n  ".join((f"{broken}; it takes {len(after.trail)} steps:", *after.trail))) from None
            seen.add(key)
            todo.append(after)
        if len(seen) > limit:
            raise LawBroken(f"over {limit} states: narrow the scope")
    return Explored(len(seen), steps, time.perf_counter() - begun)

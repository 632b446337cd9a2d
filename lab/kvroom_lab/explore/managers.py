"""One manager at one moment, and its state after each event.

A `Manager` never changes: `Managers.step` returns the next one, and what it wants done outside. Each pair of a manager
and an event is computed once, however many worlds it occurs in. Laws about a single manager are checked here, also
once: the table's consistency (law 1), clearing (2), late and foreign messages and rooms opened twice (3), the order of
phases (4), releases (6), silent peers (7), and the causes of failures (11).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import (
    Abort,
    ChecksumsAgree,
    Decline,
    Done,
    Failure,
    Message,
    Offer,
    Peer,
    Progress,
    Quiesced,
    Renew,
)
from kvroom.core.phases import ENDED, GIVEN_UP, TERMINAL, KVPoll, Phase, Side
from kvroom.core.room import Room, Timer
from kvroom.core.settings import Timeouts, Wait
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.errors import LocalRoomError, RoomInUse

from .frozen import behaviour_key, exact_key
from .scopes import REQUEST, Machines, Scope

ROOM = 7
PAUSE_S = 0.5
"""The length of a pause at a source in a scope of slow offers; every deadline of these worlds is 1 s."""
_NEVER = 999  # a generation that no sink draws, an incarnation that no peer has
_ORDER = {phase: rank for rank, phase in enumerate(Phase)}
_WORDS = Failure(
    side=Side.SOURCE, phase="SENDING", peer="a peer", detail="invented for this check", cause=Cause.ABORTED
)


class LawBroken(AssertionError):
    """A law does not hold in some reachable state; the text is the law and the shortest trace to that state."""


class Wish(NamedTuple):
    """An effect outside a manager: a message, a transfer, a fence, or a change of phase that the world checks."""

    kind: str  # "send", "submit", "fence", "released", "landed", "sent"
    peer: Peer | None = None
    message: Message | None = None
    generation: int | None = None
    transfer: int = 0
    start: int = 0
    stop: int = 0
    sources: frozenset[Peer] = frozenset()


Event = tuple[Any, ...]
"""An event at a manager: a kind, which is the name of a method of `_Step`, and its arguments."""


class Manager:
    """A table, its clock, and the state of its driver and its engine.

    `behaviour` is a number that two managers share if they behave the same.
    """

    __slots__ = ("behaviour", "ended", "granted", "linked", "me", "next", "now", "opened", "released", "resolving",
                 "rooms", "table")  # fmt: skip

    def __init__(self, me: Peer, table: RoomTable) -> None:
        self.me, self.table = me, table
        self.now = 0.0
        self.opened = 0
        self.released: frozenset[int] = frozenset()  # rooms, by order of opening, whose pages were released
        self.granted: frozenset[int] = frozenset()  # rooms whose grant has not been revoked
        self.linked: frozenset[Peer] = frozenset()  # peers whose link is up, as far as this manager has noticed
        self.resolving: frozenset[int] = frozenset()  # rooms of sinks whose links are not up yet
        self.ended: tuple[Room, ...] = ()  # rooms in `resolving` that have left the table
        self.rooms: tuple[Room, ...] = ()
        self.next: dict[Event, tuple[Manager, tuple[Wish, ...]]] = {}
        self.behaviour = -1

    def copy(self) -> Manager:
        """Return an independent copy, to be changed before it is interned."""
        copy = Manager(self.me, self.table.copy())
        copy.now, copy.opened, copy.released = self.now, self.opened, self.released
        copy.granted, copy.linked = self.granted, self.linked
        copy.resolving, copy.ended = self.resolving, tuple(room.copy() for room in self.ended)
        return copy

    def known(self) -> Hashable:
        """Return a key of everything but the clock and the table."""
        ended = tuple(owner_of(room) for room in self.ended)
        return self.me, self.opened, self.released, self.granted, self.linked, self.resolving, ended

    def uncleared(self) -> Room | None:
        """Return the room that the engine still holds a handle of, or None."""
        return next((room for room in self.rooms if not room.cleared), None)


class Managers:
    """All managers that one exploration has met, each stored once."""

    def __init__(self, scope: Scope, machines: Machines) -> None:
        self.scope, self.machines = scope, machines
        # Otherwise all timeouts are equal, and a sink ends before it renews.
        slow = {"offer_s": 0.25, "renew_s": 0.5} if scope.slow_offers else {}
        self._timeouts = Timeouts(**{**dict.fromkeys(Timeouts.__struct_fields__, 1.0), **slow})
        self._met: dict[Hashable, Manager] = {}
        self._kinds: dict[Hashable, int] = {}

    @property
    def count(self) -> int:
        """Return the number of managers met."""
        return len(self._met)

    def new(self, me: Peer) -> Manager:
        """Return the manager of a process that has just started."""
        return self._intern(Manager(me, self.machines.table(self._timeouts)))

    def step(self, manager: Manager, event: Event) -> tuple[Manager, tuple[Wish, ...]]:
        """Return the manager after this event, and what it wants done. Raise `LawBroken` if the event breaks a law."""
        found = manager.next.get(event)
        if found is None:
            step = _Step(self.scope, self.machines, manager)
            step.take(event)
            found = manager.next[event] = self._intern(step.manager), tuple(step.wishes)
        return found

    def _intern(self, manager: Manager) -> Manager:
        known = manager.known()
        key = (known, manager.now, exact_key(manager.table))
        met = self._met.get(key)
        if met is not None:
            return met
        manager.rooms = tuple(manager.table)
        kind = (known, behaviour_key(manager.table, manager.now))
        if kind not in self._kinds:
            judge(manager, self)
            self._kinds[kind] = len(self._kinds)
        manager.behaviour = self._kinds[kind]
        self._met[key] = manager
        return manager


class _Step:
    """One event at a copy of a manager: it is applied, its effects are collected, and the change is checked."""

    def __init__(self, scope: Scope, machines: Machines, before: Manager) -> None:
        self.scope, self.machines, self.before = scope, machines, before
        self.manager = before.copy()
        self.wishes: list[Wish] = []

    def take(self, event: Event) -> None:
        kind, *arguments = event
        rooms = list(self.manager.table)
        try:
            getattr(self, kind)(*arguments)
            self._settle()
        except RoomInUse as error:
            raise LawBroken(f"law 2: {error}; and its room is cleared") from None
        except LocalRoomError as error:
            raise LawBroken(f"law 4: {self.manager.me} forbids what it must allow: {error}") from None
        self._compare(event)
        self._keep_ended(rooms)

    # -- events ---------------------------------------------------------------------------------------------------

    def open(self) -> None:
        it = self.manager
        it.opened += 1
        if is_source(it.me):
            identity = None if self.scope.states_late else REQUEST
            it.table.open(self.machines.source(it.table.timeouts, Slot(it.opened), identity), ROOM, None, it.now)
        else:
            generation = it.me.incarnation * 100 + it.opened
            sink = self.machines.sink(it.table.timeouts, Slot(it.opened), self.scope.asked_for)
            it.table.open(sink, ROOM, generation, it.now)
            if self.scope.late_links:
                it.resolving |= {it.opened}

    def ask(self, owner: int, what: asked.Input) -> None:
        if isinstance(what, asked.OfferPages) and what.grant:
            self.manager.granted |= {owner}
        room = self._room(owner)
        if isinstance(what, asked.Resolved):
            self.manager.resolving -= {owner}
        self._feed(room, what)

    def transfer(self, generation: int, what: asked.Input) -> None:
        room = next((room for room in self.manager.table if room.knows(generation)), None)
        if room is None:
            raise LawBroken(
                f"law 6: a transfer of generation {generation} is in flight, and no source room has that generation"
            )
        self._feed(room, what)

    def hear(self, peer: Peer, seq: int, message: Message) -> None:
        self.manager.table.receive(peer, seq, message, self.manager.now)

    def up(self, peer: Peer) -> None:
        self.manager.linked |= {peer}
        self.manager.table.peer_up(peer, self.manager.now)
        if self.manager.table.overtaken(peer, 1):
            raise LawBroken(f"law 7: {self.manager.me} ignores the first message of {peer} on a new link")

    def lost(self, peer: Peer) -> None:
        self.manager.linked -= {peer}
        self.manager.table.peer_lost(peer, "the connection closed", self.manager.now)

    def fenced(self, peer: Peer) -> None:
        self.manager.table.fenced(peer, self.manager.now)

    def expire(self) -> None:
        it = self.manager
        deadline = it.table.deadline()
        assert deadline is not None  # the event happens only at a manager with a deadline
        it.now = max(it.now, deadline)
        it.table.expire(it.now)

    def pause(self) -> None:
        """Let time pass without reaching a deadline."""
        self.manager.now += PAUSE_S

    def _room(self, owner: int) -> Room:
        rooms: Iterable[Room] = (*self.manager.table, *self.manager.ended)
        return next(room for room in rooms if owner_of(room) == owner)

    def _keep_ended(self, before: list[Room]) -> None:
        """Keep rooms that have left the table and whose links may still come up: that input must be harmless."""
        it = self.manager
        rooms = [room for room in (*it.ended, *before) if owner_of(room) in it.resolving]
        it.ended = tuple(room for room in rooms if room not in set(it.table))

    def _feed(self, room: Room, what: asked.Input) -> None:
        self.manager.table.feed(room, what, self.manager.now)

    # -- effects, carried out as the driver does ------------------------------------------------------------------

    def _settle(self) -> None:
        while todo := self.manager.table.take_effects():
            for room, effect in todo:
                self._perform(room, effect)

    def _perform(self, room: Room | None, effect: do.Effect) -> None:
        if isinstance(effect, do.Send):
            self._judge_words(room, effect.message)
            self.wishes.append(Wish("send", effect.peer, effect.message))
        elif isinstance(effect, do.Fence):
            self.wishes.append(Wish("fence", effect.peer))
        elif room is not None:
            self._perform_for(room, effect)

    def _perform_for(self, room: Room, effect: do.Effect) -> None:
        it = self.manager
        if isinstance(effect, do.Submit):
            if effect.peer in it.linked:
                generation = effect.offer.generation
                self.wishes.append(
                    Wish("submit", effect.peer, None, generation, effect.transfer, effect.start, effect.stop)
                )
            else:
                self._feed(room, asked.Broke(transfer=effect.transfer, detail="the link was lost"))
        elif isinstance(effect, do.Revoke) and effect.grant:
            it.granted -= {owner_of(room)}
            self._feed(room, asked.Revoked())
        elif isinstance(effect, do.ReleasePages):
            if owner_of(room) in it.released:
                raise LawBroken(f"law 6: {it.me} releases the pages of a room twice")
            it.released |= {owner_of(room)}
            self.wishes += [Wish("released", generation=generation) for generation in generations_of(room)]

    # -- checks of the change -------------------------------------------------------------------------------------

    def _compare(self, event: Event) -> None:
        old = {owner_of(room): room for room in self.before.rooms}
        for room in self.manager.table:
            was = old[owner_of(room)].phase if owner_of(room) in old else Phase.NEW
            if room.phase is was:
                continue
            if was in TERMINAL or _ORDER[room.phase] < _ORDER[was]:
                raise LawBroken(f"law 4: {room.phase.name} came after {was.name}")
            if room.phase in GIVEN_UP and was not in GIVEN_UP:
                self._judge_failure(room, event)
            if room.phase is Phase.LANDED and isinstance(room, Sink):
                self._judge_landing(event)
                self.wishes.insert(0, Wish("landed", generation=room.generation, sources=room.sources))
            if room.phase is Phase.SENT:
                self.wishes += [Wish("sent", generation=generation) for generation in generations_of(room)]
                if self.scope.together and len(generations_of(room)) < self.scope.sinks:
                    raise LawBroken("law 8: a source reports success, and one of its sinks has not offered")
        if event[0] == "hear" and event[1] in self.before.linked and not self.before.table.overtaken(*event[1:3]):
            self._judge_hearing(old, event[1], event[3])

    def _judge_hearing(self, old: Mapping[Slot, Room], peer: Peer, message: Message) -> None:
        """Check what a message did to the rooms.

        A renewal restarts the deadline of a source that waits for an offer, and changes no other deadline. The abort
        of a source ends the room of its sink.
        """
        for room in self.manager.table:
            was = old[owner_of(room)]
            restarted = Timer(Wait.BOOTSTRAP, self.manager.now + 1.0) if was.phase is Phase.EXPECTED else was.timer
            if isinstance(message, Renew) and room.timer != restarted:
                raise LawBroken(f"law 7: a renewal in phase {was.phase.name} changes {was.timer} to {room.timer}")
            about_it = isinstance(room, Sink) and was.knows(message.generation) and peer in was.involved()
            if isinstance(message, Abort) and about_it and room.phase not in ENDED:
                raise LawBroken(
                    f"law 11: {self.manager.me} received the failure «{message.failure.detail}» and goes on"
                )

    def _judge_landing(self, event: Event) -> None:
        if event[0] == "ask" and isinstance(event[2], asked.Verified) and event[2].error is not None:
            raise LawBroken(f"law 8: {self.manager.me} reports success, and the checksums differ")

    def _judge_failure(self, room: Room, event: Event) -> None:
        """Check that a failure is complete, and that a room which received a peer's failure keeps its words."""
        failure = room.failure
        if failure is None or not all((failure.side, failure.phase, failure.peer, failure.detail)):
            raise LawBroken(f"law 11: a room of {self.manager.me} failed without a complete cause: {failure}")
        if f"room {ROOM} " not in failure.sentence(room.number):
            raise LawBroken(f"law 11: the sentence does not name the room: {failure.sentence(room.number)}")
        told = [message.failure for message in heard(event, self.before) if message.failure is not None]
        if told and failure not in told:
            raise LawBroken(
                f"law 11: {self.manager.me} received the failure «{told[0].detail}» and reports «{failure.detail}»"
            )
        if event[0] == "transfer" and isinstance(event[2], asked.Broke) and event[2].revoked:
            raise LawBroken(
                f"law 11: {self.manager.me} reports «{failure.detail}», although the sink will send the cause"
            )

    def _judge_words(self, room: Room | None, message: Message) -> None:
        """Check that a room sends its own failure.

        Only a second offer for a room in use gets another one, `RoomInUse`.
        """
        words = getattr(message, "failure", None)
        if room is None or words is None or words == room.failure:
            return
        if not (isinstance(message, Quiesced) and words.detail.startswith("RoomInUse")):
            raise LawBroken(f"law 11: {self.manager.me} failed with «{room.failure}» and sends «{words}»")


def is_source(peer: Peer) -> bool:
    """Return whether this peer is a rank of the prefill side; the others are decode workers."""
    return peer.address.startswith("prefill")


def generations_of(room: Room) -> tuple[int | None, ...]:
    """Return the generations by which messages name a room: for a source, those of all sinks that it serves."""
    deliveries = room.deliveries if isinstance(room, Source) else ()
    return tuple(delivery.offer.generation for delivery in deliveries) or (room.generation,)


class Slot(int):
    """The number of a room in the order in which its manager opened them. It takes the place of an engine's handle."""

    def update(self, room: Room, /) -> None:
        """Do nothing: `_Step` checks the laws itself."""

    def release(self, pages: tuple[int, ...], /) -> None:
        """Do nothing: `_Step` sees the effect itself."""


def owner_of(room: Room) -> Slot:
    """Return the number of this room in the order of opening."""
    assert isinstance(room.listener, Slot)  # set by `_Step.open`
    return room.listener


def heard(event: Event, before: Manager) -> Iterator[Any]:
    """Return the messages with a failure that this event brings to a room: from a peer now, or kept as early ones."""
    messages = [event[3]] if event[0] == "hear" else before.table.early_messages() if event[0] == "open" else ()
    return (message for message in messages if hasattr(message, "failure"))


# -- checks of one manager at rest ----------------------------------------------------------------------------------


def judge(manager: Manager, managers: Managers) -> None:
    """Check the laws that hold for every manager, whatever the state of the rest of the world."""
    audit = manager.table.audit()
    if audit.inconsistent:
        raise LawBroken(f"law 1: the table of {manager.me} disagrees with its rooms: {audit}")
    for room in manager.table:
        if room.gone:
            raise LawBroken(f"law 2: a cleared room in {room.phase.name} remains in the table of {manager.me}")
    if manager.table.early_messages() and not manager.linked:
        raise LawBroken(f"law 3: {manager.me} keeps offers of peers whose links are lost")
    _judge_silence(manager)
    _judge_foreign_messages(manager)
    _judge_asking_twice(manager, managers)


def _judge_silence(manager: Manager) -> None:
    """Law 7: if no peer sends anything from here on, deadlines alone end every room."""
    table = manager.table.copy()
    for _ in range(6):
        deadline = table.deadline()
        if deadline is not None:
            table.expire(deadline)
            table.take_effects()
    if any(room.status not in (KVPoll.Failed, KVPoll.Success) for room in table):
        raise LawBroken(f"law 7: with its peer silent, a room of {manager.me} never ends")


def _judge_foreign_messages(manager: Manager) -> None:
    """Law 3: a message from a lost peer, or about another generation, changes nothing but counters."""
    generations = [room.generation for room in manager.rooms if room.generation is not None]
    opposite = Peer("decode-0" if is_source(manager.me) else "prefill-0", _NEVER)
    involved = {peer for room in manager.rooms for peer in room.involved()}
    stale = [
        (peer, _saying(kind, generation), "whose link is lost")
        for peer in sorted({opposite} | involved - manager.linked)
        for generation in (*generations, _NEVER)
        for kind in (Offer, Renew, Decline, Done, Abort, ChecksumsAgree, Quiesced, Progress)
    ]
    foreign = [
        (peer, _saying(kind, _NEVER), "about another generation")
        for peer in sorted(manager.linked)
        for kind in (Done, Quiesced, Progress, Abort, ChecksumsAgree)
    ]
    if _is_changed_by(stale + foreign, manager):  # first all together: testing them one by one is slow
        for saying in stale + foreign:
            if _is_changed_by([saying], manager):
                peer, message, what = saying
                raise LawBroken(f"law 3: {type(message).__name__} of {peer}, {what}, changes something at {manager.me}")


def _is_changed_by(sayings: list[tuple[Peer, Message, str]], manager: Manager) -> bool:
    """Return whether these messages change anything, apart from counters and answers to aborts of linked peers."""
    table = manager.table.copy()
    for number, (peer, message, _) in enumerate(sayings):
        table.receive(peer, 10**6 + number, message, manager.now)
    wanted = [effect for _, effect in table.take_effects()]
    answers = [it for it in wanted if isinstance(it, do.Send) and isinstance(it.message, Quiesced)]
    if len(answers) < len(wanted) or any(answer.peer not in manager.linked for answer in answers):
        return True
    return behaviour_key(table, manager.now) != behaviour_key(manager.table, manager.now)


def _saying(kind: Any, generation: int) -> Message:
    fields: dict[Any, dict[str, Any]] = {
        Offer: {"start": 0, "stop": 1, "pages": (4,), "identity": REQUEST},
        Done: {"tokens": 1, "nbytes": 1, "identity": REQUEST},
        Progress: {"tokens": 1},
        ChecksumsAgree: {},
        Renew: {},
    }
    message: Message = kind(room=ROOM, generation=generation, **fields.get(kind, {"failure": _WORDS}))
    return message


def _judge_asking_twice(manager: Manager, managers: Managers) -> None:
    """Law 2 and 3: clearing again changes nothing; opening a number in use is refused and leaves its room unchanged."""
    table = manager.table.copy()
    for room in table:
        if room.cleared:
            table.feed(room, asked.Clear(), manager.now)
    if any(not room.cleared for room in table):
        make = managers.machines.source if is_source(manager.me) else managers.machines.sink
        try:
            table.open(make(table.timeouts, Slot(-1)), ROOM, None if is_source(manager.me) else _NEVER, manager.now)
        except RoomInUse:
            pass
        else:
            raise LawBroken(f"law 3: {manager.me} opens a number that is in use")
    if table.take_effects() or behaviour_key(table, manager.now) != behaviour_key(manager.table, manager.now):
        raise LawBroken(
            f"law 2: {manager.me} changes when a cleared room is cleared again or a number in use is refused"
        )

"""The one home of all rooms: every room of a manager, of either side, is in this table and nowhere else.

What else is kept here is derived from the rooms and kept by `_settle` alone, after every input: which rooms a peer
concerns, and which deadline comes next. A room that is `gone` leaves all of it in the same step.

Messages from a peer are taken in the order in which it numbered them. One that is not newer than the last is ignored
and counted, so a repeated or overtaken message can never revive anything, and no memory of ended rooms is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kvroom.errors import LimitExceeded, RoomInUse

from . import effects as do
from . import inputs as asked
from .messages import Abort, Decline, Failure, Message, Offer, Peer, Quiesced
from .phases import GIVEN_UP, SUCCEEDED, Phase
from .room import Room, Seat
from .settings import Limits, Timeouts
from .source import Source


class Counters(msgspec.Struct):
    """What happened since the start. They only grow, and no rule reads them."""

    opened: int = 0
    succeeded: int = 0
    failed: int = 0
    late_messages: int = 0  # for a room, generation or peer that is not open, or said already
    overtaken_messages: int = 0  # not newer than one that the same peer sent later
    early_arrivals: int = 0
    early_refused: int = 0  # over the limit, or a second offer for the same number
    early_expired: int = 0
    rooms_refused: int = 0  # RoomInUse, or over the limit


class Audit(msgspec.Struct, frozen=True):
    """What is kept now, recounted from the rooms themselves. An idle manager whose rooms are cleared has all zeros."""

    sources: int = 0
    sinks: int = 0
    draining: int = 0  # of these rooms, given up and not yet drained
    quarantined: int = 0  # of these rooms, overdue with their drain
    quarantined_pages: int = 0
    early_arrivals: int = 0
    indexed: int = 0  # entries of the peer index: (peer, room) pairs
    timers: int = 0
    inconsistent: int = 0  # entries of the index or the timers that no room accounts for, or that are missing

    @property
    def empty(self) -> bool:
        """Nothing is left of any room."""
        return self == Audit()


class _Early(NamedTuple):
    """What a sink said about a room that the prefill engine has not opened yet."""

    peer: Peer
    message: Offer | Decline
    until: float


class _Known:
    """A peer whose link is up, or that some room still concerns."""

    __slots__ = ("early", "last_seq", "rooms", "up")

    def __init__(self) -> None:
        self.up = False
        self.last_seq = 0
        self.early: set[int] = set()  # numbers
        self.rooms: set[Room] = set()

    def copy(self, twins: dict[Room, Room]) -> _Known:
        twin = _Known()
        twin.up, twin.last_seq, twin.early = self.up, self.last_seq, set(self.early)
        twin.rooms = {twins[room] for room in self.rooms}
        return twin


class RoomTable:
    """Holds the rooms, routes inputs to them, and hands out what they want done.

    Not thread-safe: one owner calls it. After every call, carry out `take_effects()`; before `deadline()`, call
    `expire`. `now` is in seconds, from one clock that does not run backwards.
    """

    def __init__(self, timeouts: Timeouts | None = None, limits: Limits | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self.limits = limits or Limits()
        self.counters = Counters()
        self._rooms: dict[tuple[str, int], list[Room]] = {}  # one number: one open room, and ended ones that drain
        self._count = 0
        self._early: OrderedDict[int, _Early] = OrderedDict()
        self._peers: dict[Peer, _Known] = {}
        # Every timer of one kind lasts equally long, so each queue is in order of its deadlines by construction.
        self._timers: dict[str, OrderedDict[Room, float]] = {
            kind: OrderedDict() for kind in self.timeouts.__struct_fields__
        }
        self._effects: list[tuple[Room | None, do.Effect]] = []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Room]:
        return (room for rooms in self._rooms.values() for room in rooms)

    # -- rooms ----------------------------------------------------------------------------------------------------

    def open(self, room: Room, number: int, generation: int | None, now: float) -> None:
        """Give a new room its number and take it in. A sink brings a fresh random generation, a source `None`.

        Raises `RoomInUse` if this side has an uncleared room with this number, `LimitExceeded` if the table is full;
        the new room is then unchanged, and so is every other.
        """
        namesakes = self._rooms.get((room.side, number), [])
        if any(not other.cleared for other in namesakes):
            self.counters.rooms_refused += 1
            raise RoomInUse(f"room {number} is open on the {room.side} side already: clear it before it is used again")
        if self._count >= self.limits.rooms:
            self.counters.rooms_refused += 1
            raise LimitExceeded(f"{self._count} rooms are open, and the limit is {self.limits.rooms} (Limits.rooms)")
        room.admit(number, generation, now)
        self._rooms.setdefault((room.side, number), []).append(room)
        self._count += 1
        self.counters.opened += 1
        early = self._forget_early(number) if isinstance(room, Source) else None
        if early is not None:
            room.receive(early.peer, early.message, now)
        self._settle(room, now)

    def feed(self, room: Room, what: asked.Input, now: float) -> None:
        """Give one room one input. `LocalRoomError` if its phase does not allow it; nothing has changed then."""
        before = room.phase
        room.handle(what, now)
        self._settle(room, now, before)

    def receive(self, peer: Peer, seq: int, message: Message, now: float) -> None:
        """Take one message from a peer. Whatever it says, nothing is raised: what cannot be taken is counted."""
        known = self._peers.get(peer)
        if known is None or not known.up:
            self.counters.late_messages += 1
            return
        if self.overtaken(peer, seq):
            self.counters.overtaken_messages += 1
            return
        known.last_seq = max(known.last_seq, seq)
        room = self._find(message)
        if room is not None:
            before = room.phase
            taken = room.receive(peer, message, now)
            self._settle(room, now, before)
        else:
            taken = self._receive_for_none(known, peer, message, now)
        if not taken:
            self.counters.late_messages += 1

    def overtaken(self, peer: Peer, seq: int) -> bool:
        """Whether this peer has said something newer already, so that message `seq` is ignored when it comes."""
        known = self._peers.get(peer)
        return known is not None and seq <= known.last_seq

    # -- peers ----------------------------------------------------------------------------------------------------

    def peer_up(self, peer: Peer, now: float) -> None:
        """The link to this peer is up. Its numbering starts anew: nothing of an earlier link can come any more."""
        known = self._peers.setdefault(peer, _Known())
        known.up, known.last_seq = True, 0
        self._tell(peer, asked.PeerUp(peer), now)

    def peer_lost(self, peer: Peer, cause: str, now: float) -> None:
        """The link to this peer is down. Costs as much as the rooms and early arrivals that this peer has."""
        known = self._peers.get(peer)
        if known is None:
            return
        known.up = False
        for number in list(known.early):
            self._forget_early(number)
        self._tell(peer, asked.PeerLost(peer, cause), now)
        self._drop_peer_if_idle(peer)

    def fenced(self, peer: Peer, now: float) -> None:
        """It is proven that this peer writes nothing into our memory any more."""
        self._tell(peer, asked.Fenced(peer), now)

    def concerns(self, peer: Peer) -> bool:
        """Whether some room still waits for this peer, or for proof that it is gone."""
        known = self._peers.get(peer)
        return known is not None and bool(known.rooms)

    def _tell(self, peer: Peer, what: asked.Input, now: float) -> None:
        known = self._peers.get(peer)
        for room in list(known.rooms) if known else ():
            self.feed(room, what, now)

    # -- time -----------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `expire` has to be called next."""
        heads = [next(iter(queue.values())) for queue in self._timers.values() if queue]
        if self._early:
            heads.append(next(iter(self._early.values())).until)
        return min(heads, default=None)

    def expire(self, now: float) -> None:
        """Act on every deadline that has come."""
        for queue in self._timers.values():
            while queue and next(iter(queue.values())) <= now:
                room = next(iter(queue))
                before = room.phase
                room.expire(now)
                self._settle(room, now, before)
        while self._early and next(iter(self._early.values())).until <= now:
            early = self._forget_early(next(iter(self._early)))
            assert early is not None  # it was there a line ago
            self.counters.early_expired += 1
            cause = f"the prefill side got no request for this room within {self.timeouts.bootstrap_s:g} s"
            self._refuse(early.peer, early.message, cause)

    # -- what comes out -------------------------------------------------------------------------------------------

    def take_effects(self) -> list[tuple[Room | None, do.Effect]]:
        """What is to be done now, in order, each with its room (None: an answer for a room that is not here)."""
        effects, self._effects = self._effects, []
        return effects

    def audit(self) -> Audit:
        """Recount everything that is kept. Costs as much as there are rooms."""
        rooms = list(self)
        quarantined = [room for room in rooms if room.phase is Phase.QUARANTINED]
        indexed = {(peer, room) for peer, known in self._peers.items() for room in known.rooms}
        timers = {(room, kind, at) for kind, queue in self._timers.items() for room, at in queue.items()}
        should_index = {(peer, room) for room in rooms for peer in room.involved()}
        should_time = {(room, *room.timer) for room in rooms if room.timer}
        idle_peers = sum(not (known.up or known.rooms or known.early) for known in self._peers.values())
        return Audit(
            sources=sum(isinstance(room, Source) for room in rooms),
            sinks=sum(not isinstance(room, Source) for room in rooms),
            draining=sum(room.phase is Phase.DRAINING for room in rooms),
            quarantined=len(quarantined),
            quarantined_pages=sum(len(room.held_pages) for room in quarantined),
            early_arrivals=len(self._early),
            indexed=len(indexed),
            timers=len(timers),
            inconsistent=len(indexed ^ should_index) + len(timers ^ should_time) + idle_peers,
        )

    def early_messages(self) -> tuple[Offer | Decline, ...]:
        """What waits for the prefill engine to open its rooms, oldest first."""
        return tuple(early.message for early in self._early.values())

    def copy(self) -> RoomTable:
        """An independent twin with twins of all rooms; for the explorer, which visits every state."""
        twin = type(self)(self.timeouts, self.limits)
        twins = {room: room.copy() for room in self}
        twin._rooms = {key: [twins[room] for room in rooms] for key, rooms in self._rooms.items()}
        twin._count, twin._early = self._count, self._early.copy()
        twin._peers = {peer: known.copy(twins) for peer, known in self._peers.items()}
        twin._timers = {
            kind: OrderedDict((twins[room], at) for room, at in queue.items()) for kind, queue in self._timers.items()
        }
        twin._effects = [(twins[room] if room else None, effect) for room, effect in self._effects]
        return twin

    # -- how it is done -------------------------------------------------------------------------------------------

    def _find(self, message: Message) -> Room | None:
        """The room that a message is for: by number if the source cannot know the generation yet, else by both."""
        if isinstance(message, Offer):
            rooms = self._rooms.get(("source", message.room), [])
            return next((room for room in rooms if not room.cleared or room.generation == message.generation), None)
        if isinstance(message, Decline):
            rooms = self._rooms.get(("source", message.room), [])
            return next((room for room in rooms if not room.cleared and room.generation is None), None)
        for side in ("sink", "source"):
            for room in self._rooms.get((side, message.room), ()):
                if room.generation == message.generation:
                    return room
        return None

    def _receive_for_none(self, known: _Known, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Offer | Decline):
            self._keep_early(known, peer, message, now)
            return True
        if isinstance(message, Abort):
            early = self._early.get(message.room)
            if early is not None and early.peer == peer and early.message.generation == message.generation:
                self._forget_early(message.room)
            # Nothing of this generation is in flight here, and being newer than its offer this ends it for good.
            self._effects.append((None, do.Send(peer, Quiesced(message.room, message.generation, message.failure))))
            return True
        return False

    def _keep_early(self, known: _Known, peer: Peer, message: Offer | Decline, now: float) -> None:
        cause = None
        if message.room in self._early:
            cause = f"RoomInUse: another decode worker ({self._early[message.room].peer}) has offered this room already"
        elif len(self._early) >= self.limits.early_arrivals:
            cause = f"{self.limits.early_arrivals} early arrivals are waiting already (Limits.early_arrivals)"
        elif len(known.early) >= self.limits.early_arrivals_per_peer:
            cause = f"{len(known.early)} early arrivals of {peer} are waiting already (Limits.early_arrivals_per_peer)"
        if cause is not None:
            self.counters.early_refused += 1
            self._refuse(peer, message, cause)
            return
        self._early[message.room] = _Early(peer, message, now + self.timeouts.bootstrap_s)
        known.early.add(message.room)
        self.counters.early_arrivals += 1

    def _forget_early(self, number: int) -> _Early | None:
        early = self._early.pop(number, None)
        if early is not None:
            self._peers[early.peer].early.discard(number)
            self._drop_peer_if_idle(early.peer)
        return early

    def _refuse(self, peer: Peer, message: Offer | Decline, cause: str) -> None:
        """Answer an offer that no room will take. A sink that has declined waits for no answer."""
        if isinstance(message, Decline):
            return
        failure = Failure("source", Phase.EXPECTED.name, str(peer), cause)
        self._effects.append((None, do.Send(peer, Quiesced(message.room, message.generation, failure))))

    def _settle(self, room: Room, now: float, before: Phase | None = None) -> None:
        """Bring everything that is derived from this room up to date, and let it go if it is gone."""
        self._effects += [(room, effect) for effect in room.take_effects()]
        if room.number is None:
            return  # not one of ours yet
        room.note(now)
        if before is not None and room.phase is not before:
            self._count_end(room, before)
        self._file(room, Seat(room.involved(), room.timer))
        if room.gone:
            key = (room.side, room.number)
            namesakes = self._rooms.get(key, [])
            if room in namesakes:
                namesakes.remove(room)
                self._count -= 1
                if not namesakes:
                    del self._rooms[key]

    def _count_end(self, room: Room, before: Phase) -> None:
        if room.phase in SUCCEEDED:
            self.counters.succeeded += 1
        elif room.phase in GIVEN_UP and before not in GIVEN_UP:
            self.counters.failed += 1

    def _file(self, room: Room, seat: Seat) -> None:
        old, room.seat = room.seat, seat
        if old.timer != seat.timer:
            if old.timer is not None:
                del self._timers[old.timer.kind][room]
            if seat.timer is not None:
                self._timers[seat.timer.kind][room] = seat.timer.at
        for peer in seat.peers - old.peers:
            self._peers.setdefault(peer, _Known()).rooms.add(room)
        for peer in old.peers - seat.peers:
            self._peers[peer].rooms.discard(room)
            self._drop_peer_if_idle(peer)

    def _drop_peer_if_idle(self, peer: Peer) -> None:
        known = self._peers.get(peer)
        if known is not None and not (known.up or known.rooms or known.early):
            del self._peers[peer]

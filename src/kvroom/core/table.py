"""The one home of all rooms: every room of a manager, of either side, is in this table and nowhere else.

What else is kept here is derived from the rooms and kept by `_settle` alone, after every input: which rooms a peer
concerns, which deadline comes next, and how many rooms are in each phase. A room that is `gone` leaves all of it in
the same step.

Messages from a peer are taken in the order in which it numbered them. One that is not newer than the last is ignored
and counted, so a repeated or overtaken message can never revive anything, and no memory of ended rooms is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from kvroom.errors import LimitExceeded, RoomInUse

from . import effects as do
from . import inputs as asked
from .causes import Cause
from .counts import Audit, Census, Counters, Ending
from .early import EarlyArrivals
from .messages import Abort, Decline, Failure, Message, Offer, Peer, Quiesced, Renew
from .phases import ENDED, SUCCEEDED, Phase, Side
from .room import IndexEntry, Room, Timer
from .settings import Limits, Timeouts, Wait
from .source import Source


class _Known:
    """A peer whose link is up, or that some room still concerns."""

    __slots__ = ("last_seq", "rooms", "up")

    def __init__(self) -> None:
        self.up = False
        self.last_seq = 0
        self.rooms: set[Room] = set()

    def copy(self, twins: dict[Room, Room]) -> _Known:
        twin = _Known()
        twin.up, twin.last_seq = self.up, self.last_seq
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
        self._rooms: dict[tuple[Side, int], list[Room]] = {}  # one number: one open room, and ended ones that drain
        self._count = 0
        self._early = EarlyArrivals(self.timeouts, self.limits)
        self._peers: dict[Peer, _Known] = {}
        # Every timer of one wait lasts equally long, so each queue is in order of its deadlines by construction.
        self._timers: dict[Wait, OrderedDict[Room, float]] = {wait: OrderedDict() for wait in Wait}
        self._census = {side: dict.fromkeys(Phase, 0) for side in (Side.SINK, Side.SOURCE)}
        self._quarantined_pages: Counter[Ending] = Counter()
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
            where = f"on the {room.side.value} side"
            raise RoomInUse(f"room {number} is already open {where}: clear it before it is used again")
        if self._count >= self.limits.rooms:
            self.counters.rooms_refused += 1
            raise LimitExceeded(f"{self._count} rooms are open, and the limit is {self.limits.rooms} (Limits.rooms)")
        room.admit(number, generation, now)
        self._rooms.setdefault((room.side, number), []).append(room)
        self._count += 1
        self.counters.opened += 1
        for early in self._early.take(number) if isinstance(room, Source) else ():
            room.receive(early.peer, early.message, now)
            self._drop_peer_if_idle(early.peer)
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
            self.counters.renewals += type(message) is Renew
            self._settle(room, now, before)
        else:
            taken = self._receive_for_none(peer, message, now)
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
        self._tell(peer, asked.PeerUp(peer=peer), now)

    def peer_lost(self, peer: Peer, detail: str, now: float) -> None:
        """The link to this peer is down. Costs as much as the rooms and early arrivals that this peer has."""
        known = self._peers.get(peer)
        if known is None:
            return
        known.up = False
        self._early.forget_peer(peer)
        self._tell(peer, asked.PeerLost(peer=peer, detail=detail), now)
        self._drop_peer_if_idle(peer)

    def fenced(self, peer: Peer, now: float) -> None:
        """It is proven that this peer writes nothing into our memory any more."""
        self._tell(peer, asked.Fenced(peer=peer), now)

    def concerns(self, peer: Peer) -> bool:
        """Whether some room still waits for this peer, or for proof that it is gone."""
        known = self._peers.get(peer)
        return known is not None and bool(known.rooms)

    def _tell(self, peer: Peer, what: asked.Input, now: float) -> None:
        known = self._peers.get(peer)
        if known is not None:  # in an order that another run has, too
            for room in sorted(known.rooms, key=lambda room: (room.side.value, room.number or 0, room.generation or 0)):
                self.feed(room, what, now)

    # -- time -----------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `expire` has to be called next."""
        heads = [next(iter(queue.values())) for queue in self._timers.values() if queue]
        early = self._early.deadline()
        return min(heads if early is None else [*heads, early], default=None)

    def expire(self, now: float) -> None:
        """Act on every deadline, and on every renewal, that has come."""
        for queue in self._timers.values():
            while queue and next(iter(queue.values())) <= now:
                room = next(iter(queue))
                before = room.phase
                room.expire(now)
                self._settle(room, now, before)
        for early in self._early.expire(now):
            self.counters.early_expired += 1
            if isinstance(early.message, Offer):
                detail = f"the prefill side got no request for this room within {self.timeouts.bootstrap_s:g} s"
                self._refuse(early.peer, early.message, Cause.BOOTSTRAP, detail)
            self._drop_peer_if_idle(early.peer)

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
        timers = {(room, wait, at) for wait, queue in self._timers.items() for room, at in queue.items()}
        should_index = {(peer, room) for room in rooms for peer in room.involved()}
        should_time = {(room, *timer) for room in rooms for timer in (room.timer, room.renewal) if timer}
        idle_peers = sum(self._is_idle(peer, known) for peer, known in self._peers.items())
        counted = Counter({(side, phase): n for side, counts in self._census.items() for phase, n in counts.items()})
        counted.subtract((room.side, room.phase) for room in rooms)
        pages: Counter[Ending] = Counter()
        for room in quarantined:
            pages[_ending_of(room)] += len(room.held_pages)
        miscounted = sum(map(abs, counted.values()))
        miscounted += sum(
            abs(pages[each] - self._quarantined_pages[each]) for each in {*pages, *self._quarantined_pages}
        )
        return Audit(
            sources=sum(isinstance(room, Source) for room in rooms),
            sinks=sum(not isinstance(room, Source) for room in rooms),
            draining=sum(room.phase is Phase.DRAINING for room in rooms),
            quarantined=len(quarantined),
            quarantined_pages=sum(pages.values()),
            early_arrivals=len(self._early),
            indexed=len(indexed),
            timers=len(timers),
            inconsistent=len(indexed ^ should_index)
            + len(timers ^ should_time)
            + idle_peers
            + miscounted
            + self._early.miscounted_bytes(),
        )

    def census(self) -> Census:
        """The rooms that are open now, by side and phase."""
        return Census(
            {side: dict(counts) for side, counts in self._census.items()},
            dict(self._quarantined_pages),
            len(self._early),
        )

    def namesakes(self, number: int) -> list[Room]:
        """The rooms with this number: at most one open one of each side, and ended ones that drain."""
        return [room for side in (Side.SINK, Side.SOURCE) for room in self._rooms.get((side, number), ())]

    def early_messages(self) -> tuple[Offer | Decline, ...]:
        """What waits for the prefill engine to open its rooms, oldest first."""
        return self._early.messages()

    def copy(self) -> RoomTable:
        """An independent twin with twins of all rooms; for the explorer, which visits every state."""
        twin = type(self)(self.timeouts, self.limits)
        twins = {room: room.copy() for room in self}
        twin._rooms = {key: [twins[room] for room in rooms] for key, rooms in self._rooms.items()}
        twin._count, twin._early = self._count, self._early.copy()
        twin._peers = {peer: known.copy(twins) for peer, known in self._peers.items()}
        twin._timers = {
            wait: OrderedDict((twins[room], at) for room, at in queue.items()) for wait, queue in self._timers.items()
        }
        twin._census = {side: counts.copy() for side, counts in self._census.items()}
        twin._quarantined_pages = self._quarantined_pages.copy()
        twin._effects = [(twins[room] if room else None, effect) for room, effect in self._effects]
        return twin

    # -- how it is done -------------------------------------------------------------------------------------------

    def _find(self, message: Message) -> Room | None:
        """The room that a message is for, if it is here."""
        for side in (Side.SINK, Side.SOURCE):
            for room in self._rooms.get((side, message.room), ()):
                if room.is_meant_by(message):
                    return room
        return None

    def _receive_for_none(self, peer: Peer, message: Message, now: float) -> bool:
        """Take a message for which there is no room. False: it is of no use without one."""
        if isinstance(message, Offer):
            refusal = self._early.keep_offer(peer, message, now)
            if refusal is None:
                self.counters.early_arrivals += 1
            else:
                self.counters.early_refused += 1
                cause, detail = refusal
                self._refuse(peer, message, cause, detail)
        elif isinstance(message, Decline):
            self._early.keep_decline(peer, message, now)
            self.counters.early_arrivals += 1
        elif isinstance(message, Abort):
            # Nothing of this generation is in flight. Newer than its offer, the abort ends it for good.
            self._early.take_back(peer, message, now)
            quiet = Quiesced(room=message.room, generation=message.generation, failure=message.failure)
            self._effects.append((None, do.Send(peer=peer, message=quiet)))
        else:
            return False
        return True

    def _refuse(self, peer: Peer, message: Offer, cause: Cause, detail: str) -> None:
        """Answer an offer that no room will take."""
        failure = Failure(side=Side.SOURCE, phase=Phase.EXPECTED.name, peer=str(peer), cause=cause, detail=detail)
        quiet = Quiesced(room=message.room, generation=message.generation, failure=failure)
        self._effects.append((None, do.Send(peer=peer, message=quiet)))

    def _settle(self, room: Room, now: float, before: Phase | None = None) -> None:
        """Bring everything that is derived from this room up to date, and let it go if it is gone."""
        self._effects += [(room, effect) for effect in room.take_effects()]
        if room.number is None:
            return  # not one of ours yet
        room.note(now)
        if before is not None and before not in ENDED and room.phase in ENDED:
            if room.phase in SUCCEEDED:
                self.counters.succeeded += 1
            else:
                self.counters.failed += 1
            ending = _ending_of(room)
            self.counters.ended[ending] = self.counters.ended.get(ending, 0) + 1
        gone, overdue_pages = room.gone, len(room.held_pages) if room.phase is Phase.QUARANTINED else 0
        phase = None if gone else room.phase
        self._file(room, IndexEntry(room.involved(), room.timer, phase, overdue_pages, room.renewal))
        if gone:
            key = (room.side, room.number)
            namesakes = self._rooms.get(key, [])
            if room in namesakes:
                namesakes.remove(room)
                self._count -= 1
                if not namesakes:
                    del self._rooms[key]

    def _file(self, room: Room, index_entry: IndexEntry) -> None:
        old, room.index_entry = room.index_entry, index_entry
        if old.phase is not index_entry.phase:
            counts = self._census[room.side]
            if old.phase is not None:
                counts[old.phase] -= 1
            if index_entry.phase is not None:
                counts[index_entry.phase] += 1
            if index_entry.quarantined_pages != old.quarantined_pages:
                self._quarantined_pages[_ending_of(room)] += index_entry.quarantined_pages - old.quarantined_pages
        if old.timer != index_entry.timer:
            self._set_timer(room, old.timer, index_entry.timer)
        if old.renewal != index_entry.renewal:
            self._set_timer(room, old.renewal, index_entry.renewal)
        for peer in index_entry.peers - old.peers:
            self._peers.setdefault(peer, _Known()).rooms.add(room)
        for peer in old.peers - index_entry.peers:
            self._peers[peer].rooms.discard(room)
            self._drop_peer_if_idle(peer)

    def _set_timer(self, room: Room, old: Timer | None, new: Timer | None) -> None:
        if old is not None:
            del self._timers[old.wait][room]
        if new is not None:
            self._timers[new.wait][room] = new.at

    def _is_idle(self, peer: Peer, known: _Known) -> bool:
        return not (known.up or known.rooms or self._early.concerns(peer))

    def _drop_peer_if_idle(self, peer: Peer) -> None:
        known = self._peers.get(peer)
        if known is not None and self._is_idle(peer, known):
            del self._peers[peer]


def _ending_of(room: Room) -> Ending:
    return Ending(room.side, room.failure.cause if room.failure else None)

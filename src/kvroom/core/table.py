"""The one home of all rooms: every room of a manager, of either side, is in this table and nowhere else.

Everything else here is derived from the rooms, and only `_settle` updates it, after every input: the rooms that a peer
concerns, the next deadline, and the number of rooms in each phase. A room that is `gone` leaves all of it in the same
step.

A peer numbers its messages. One that is not newer than the last is ignored and counted, so a repeated or overtaken
message can never revive a room, and the table needs no memory of ended rooms.
"""

# Theory of operation
#
# The table finds the room of an input, feeds it, and then `_settle` derives from the room everything else that is kept.
# Below, P is a manager with sources and S one with sinks. Names in CamelCase without quotes are mutants of
# tests/core/mutants.py, names in snake_case are bugs of tests/runtime/planted.py or tests.
#
# 1. Derived entries are written in one place. S opens a room, its links come up, and the engine clears it. If one of
#    the entries was removed by a handler of its own, some path to the end would miss it, and it would stay for the life
#    of the process: the peer index (ClearForgetsThePeerIndex, clear_forgets_the_peer_index), the timer (LeavesTheTimer)
#    or the room itself (DropsTheTableEntryLate, an_ended_room_stays_in_the_table). `audit` recounts all of them from
#    the rooms.
# 2. A message that is not newer than the last one from its peer is ignored. S offers, and P gets the offer before its
#    engine opens the room. A second copy of the offer arrives; as the number has an offer, P answers it with `Quiesced`
#    (`RoomInUse`). P's engine opens the room, which takes the first copy and writes; S takes the answer for the proof
#    that P does not write, and releases the pages. HonoursALateOffer, overtaken_messages_are_taken. The last message
#    itself counts as old, or exactly this copy would pass: TakesTheLastMessageAgain. An offer that its own `Abort` has
#    overtaken is ignored too: test_an_offer_that_its_own_abort_has_overtaken_is_ignored.
# 3. Numbers are counted per incarnation and start again with each link. S dies after its first message, and another
#    process takes its address: if P continued the count by address, it would ignore the first messages of the new
#    process, and their rooms would wait until their deadlines (NumbersPeersByAddress, a_peer_is_known_by_its_address).
#    The same holds after a lost link: CountsOnAcrossLinks. Starting again is safe because of rule 4.
# 4. Messages of a peer whose link is lost are ignored. P's link to S is lost, and P drops what S had offered; an offer
#    of that link that comes out of a queue afterwards would be kept for a peer that cannot be answered. HearsALostPeer,
#    KeepsOffersOfALostPeer, test_a_lost_peer_takes_its_early_offers_and_declines_along.
# 5. A message reaches a room only if the room knows its generation. S's engine uses a number again, and an `Abort` or
#    `Done` for the first use arrives: it would end or complete the second use. IgnoresTheGeneration,
#    the_generation_is_not_compared, test_a_message_of_another_generation_changes_nothing. A source has no generation
#    before its first offer, so `Offer`, `Decline` and `Renew` find it by its number (`Source.hears`).
# 6. An `Abort` for a room that is not here is answered with `Quiesced`. P's room is gone, or its engine never opened
#    it: without the answer, S would keep its pages in quarantine. IsSilentForAGoneRoom,
#    test_an_abort_for_a_room_that_the_source_does_not_know_is_answered_at_once. The answer is true, because a gone
#    source has nothing in flight, and because by rule 2 the offer cannot arrive after its abort. But the offer may wait
#    as an early arrival: S offers, S aborts, P answers, and then P's engine opens the room, takes the offer and writes
#    into released pages. So the abort removes the offer: KeepsAnAbortedOffer.
# 7. A `Renew` is not kept for a room that is not open. If it took the place of an offer and expired, P would refuse it
#    with `Quiesced`; P's engine then opens the room, S offers, P writes, and S takes the earlier `Quiesced` for proof.
#    TakesARenewalForAnOffer, test_a_renewal_for_a_room_that_is_not_open_is_counted_and_not_kept.
# 8. A new incarnation proves nothing about the old one. P's process dies with transfers in flight in a network card or
#    a kernel, and a new process links from its address: only the transport can prove that these have ended.
#    TakesARestartForProof.
# 9. A number can be opened again when its last room is cleared, even while that one drains. S's engine clears a room
#    whose pages wait for proof; a router that uses the number again must not be refused until `kvroom fence`
#    (RefusesWhileTheOldOneDrains). Before the clear, a second room is refused and the first is untouched, or two
#    requests would share one number on one side (OpensANumberTwice,
#    test_a_second_room_with_the_same_number_is_refused_and_the_first_is_untouched).

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
    """The link state of a peer that is linked, or that a room or an early arrival still concerns."""

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
    """Holds the rooms, routes inputs to them, and collects their effects.

    Not thread-safe: one owner calls it. After every call, carry out `take_effects()`; call `expire` at `deadline()` at
    the latest. `now` is in seconds, from one clock that does not run backwards.
    """

    def __init__(self, timeouts: Timeouts | None = None, limits: Limits | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self.limits = limits or Limits()
        self.counters = Counters()
        self._rooms: dict[tuple[Side, int], list[Room]] = {}  # per number: one uncleared, and draining ones
        self._count = 0
        self._early = EarlyArrivals(self.timeouts, self.limits)
        self._peers: dict[Peer, _Known] = {}
        # All timers of one wait have the same duration, so each queue is ordered by deadline without sorting.
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
        """Give a new room its number and store it. A sink brings a fresh random generation, a source `None`.

        Raises `RoomInUse` if this side has an uncleared room with this number, and `LimitExceeded` if the table is
        full. The new room and all others are then unchanged.
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
        """Give one room one input. Raises `LocalRoomError`, and changes nothing, if its phase does not allow it."""
        before = room.phase
        room.handle(what, now)
        self._settle(room, now, before)

    def receive(self, peer: Peer, seq: int, message: Message, now: float) -> None:
        """Take one message from a peer. Raises nothing: a message that no room takes is counted in `counters`."""
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
        """Return True if a message of this peer with this number or a later one was taken, so that `seq` is ignored."""
        known = self._peers.get(peer)
        return known is not None and seq <= known.last_seq

    # -- peers ----------------------------------------------------------------------------------------------------

    def peer_up(self, peer: Peer, now: float) -> None:
        """Note that the link to this peer is up, and inform its rooms. Any message number is new then (rule 3)."""
        known = self._peers.setdefault(peer, _Known())
        known.up, known.last_seq = True, 0
        self._tell(peer, asked.PeerUp(peer=peer), now)

    def peer_lost(self, peer: Peer, detail: str, now: float) -> None:
        """Note that the link to this peer is down, inform its rooms and drop its early arrivals."""
        known = self._peers.get(peer)
        if known is None:
            return
        known.up = False
        self._early.forget_peer(peer)
        self._tell(peer, asked.PeerLost(peer=peer, detail=detail), now)
        self._drop_peer_if_idle(peer)

    def fenced(self, peer: Peer, now: float) -> None:
        """Inform the rooms of this peer that, by proof, it can no longer write into the memory of this process."""
        self._tell(peer, asked.Fenced(peer=peer), now)

    def concerns(self, peer: Peer) -> bool:
        """Return True if a room still waits for this peer, or for proof that it no longer writes."""
        known = self._peers.get(peer)
        return known is not None and bool(known.rooms)

    def _tell(self, peer: Peer, what: asked.Input, now: float) -> None:
        known = self._peers.get(peer)
        if known is not None:  # sorted, so that a simulation repeats exactly
            for room in sorted(known.rooms, key=lambda room: (room.side.value, room.number or 0, room.generation or 0)):
                self.feed(room, what, now)

    # -- time -----------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return the time at which `expire` must be called next, or None if no room waits."""
        heads = [next(iter(queue.values())) for queue in self._timers.values() if queue]
        early = self._early.deadline()
        return min(heads if early is None else [*heads, early], default=None)

    def expire(self, now: float) -> None:
        """Act on every deadline and every renewal that is due, and refuse early offers that have timed out."""
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

    # -- output ---------------------------------------------------------------------------------------------------

    def take_effects(self) -> list[tuple[Room | None, do.Effect]]:
        """Return the effects to carry out, in order, each with its room (None: no room is open here), and drop them."""
        effects, self._effects = self._effects, []
        return effects

    def audit(self) -> Audit:
        """Recount everything that is kept from the rooms themselves. Takes time in proportion to their number."""
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
        """Return the number of rooms by side and phase, as counted on each change."""
        return Census(
            {side: dict(counts) for side, counts in self._census.items()},
            dict(self._quarantined_pages),
            len(self._early),
        )

    def namesakes(self, number: int) -> list[Room]:
        """Return the rooms with this number: one uncleared room of each side at most, and cleared ones that drain."""
        return [room for side in (Side.SINK, Side.SOURCE) for room in self._rooms.get((side, number), ())]

    def early_messages(self) -> tuple[Offer | Decline, ...]:
        """Return the messages whose rooms the prefill engine has not opened: offers, then declines, oldest first."""
        return self._early.messages()

    def copy(self) -> RoomTable:
        """Return an independent copy with copies of all rooms, for the explorer, which visits every state."""
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

    # -- internals ------------------------------------------------------------------------------------------------

    def _find(self, message: Message) -> Room | None:
        """Return the room that a message is for, or None if it is not open here."""
        for side in (Side.SINK, Side.SOURCE):
            for room in self._rooms.get((side, message.room), ()):
                if room.is_meant_by(message):
                    return room
        return None

    def _receive_for_none(self, peer: Peer, message: Message, now: float) -> bool:
        """Keep or answer a message that has no room here. Return False, having changed nothing, if it needs a room."""
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
            # Nothing of this generation is in flight, and its offer, which is older, can no longer be taken (rule 6).
            self._early.take_back(peer, message, now)
            quiet = Quiesced(room=message.room, generation=message.generation, failure=message.failure)
            self._effects.append((None, do.Send(peer=peer, message=quiet)))
        else:
            return False
        return True

    def _refuse(self, peer: Peer, message: Offer, cause: Cause, detail: str) -> None:
        """Answer an offer that cannot be kept: `Quiesced` with this cause and detail."""
        failure = Failure(side=Side.SOURCE, phase=Phase.EXPECTED.name, peer=str(peer), cause=cause, detail=detail)
        quiet = Quiesced(room=message.room, generation=message.generation, failure=failure)
        self._effects.append((None, do.Send(peer=peer, message=quiet)))

    def _settle(self, room: Room, now: float, before: Phase | None = None) -> None:
        """Update everything that is derived from this room, and remove the room if it is gone."""
        self._effects += [(room, effect) for effect in room.take_effects()]
        if room.number is None:
            return  # not admitted: the table does not hold it
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

"""Every reachable state of one source and one sink keeps the laws, and every planted bug is found."""

from __future__ import annotations

from typing import Any

import pytest

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.messages import Abort, Peer, Quiesced
from kvroom.core.phases import GIVEN_UP, TERMINAL, Event, Phase
from kvroom.core.room import Room, Seat
from kvroom.core.rooms import RoomTable
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.testing.explore import LawBroken, Machines, Scope, explore

SCOPES = {
    "one-sided transport": Scope(expiries=1, link_losses=0),
    "one-sided transport, the link is lost once": Scope(chunks=1, expiries=1, link_losses=1),
    "the sink writes, the link is lost once": Scope(chunks=1, enforcing=True, expiries=1, link_losses=1),
    "the room is used twice": Scope(chunks=1, openings=2, expiries=0, link_losses=0, drops=False, aborts=False),
}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_the_laws_hold_in_every_state(scope: Scope) -> None:
    explored = explore(scope)
    print(f"{explored.states} states, {explored.steps} steps, {explored.seconds:.1f} s")
    assert explored.states > 2_000


class ForgetsTheAbortedRoom(Source):
    """Answers an abort at once, as if nothing of it were in flight."""

    def receive(self, peer: Peer, message: Any, now: float) -> bool:
        if isinstance(message, Abort) and peer == self.peer and self.phase not in TERMINAL:
            self.outbox.append(do.Send(peer, Quiesced(message.room, message.generation, message.failure)))
            return True
        return super().receive(peer, message, now)


class HonoursALateOffer(RoomTable):
    """Takes messages that were overtaken, so an offer that comes after its own abort opens the pages again."""

    def overtaken(self, peer: Peer, seq: int) -> bool:
        return False


class ClearForgetsThePeerIndex(RoomTable):
    """Lets a cleared room go and leaves its entry under its peer."""

    def _file(self, room: Room, seat: Seat) -> None:
        super()._file(room, Seat(room.seat.peers, seat.timer) if room.gone else seat)


class ReleasesOnATimeout(Sink):
    """Takes the end of the drain deadline for a proof."""

    def expire(self, now: float) -> None:
        if self.timer is not None and now >= self.timer.at and self.phase in GIVEN_UP:
            self._finish(Event.QUIET)
        else:
            super().expire(now)


class ReleasesOnClear(Sink):
    """Gives the pages back when the engine clears, while a source may still write."""

    def _asked_to_clear(self, what: asked.Clear, now: float) -> None:
        super()._asked_to_clear(what, now)
        if self.phase is Phase.DRAINING:
            self._finish(Event.QUIET)

    handlers = {**Sink.handlers, asked.Clear: _asked_to_clear}


class TakesALostLinkForProof(Sink):
    """Believes that a peer whose link is lost writes no more."""

    def _peer_lost(self, what: asked.PeerLost, now: float) -> None:
        super()._peer_lost(what, now)
        self.writers -= {what.peer}
        self._release_if_drained()

    handlers = {**Sink.handlers, asked.PeerLost: _peer_lost}


class SaysDoneTooEarly(Source):
    """Reports completion when the last chunk was submitted, not when it landed."""

    def _submit_chunks(self, now: float) -> None:
        super()._submit_chunks(now)
        if self.chunks and self.chunks[-1].last and self.phase is Phase.SENDING:
            self.in_flight = frozenset()
            self._finish_if_complete(now)

    def _landed(self, what: asked.Landed, now: float) -> None:
        if what.transfer in self.in_flight:
            super()._landed(what, now)

    def _broke(self, what: asked.Broke, now: float) -> None:
        if what.transfer in self.in_flight:
            super()._broke(what, now)

    handlers = {**Source.handlers, asked.Landed: _landed, asked.Broke: _broke}


class SubmitsAfterAbort(Source):
    """Goes on with the engine's chunks after it has said that it is quiet."""

    def _send_pages(self, what: asked.SendPages, now: float) -> None:
        if self.phase is Phase.RELEASED and self.offer is not None and self.peer is not None:
            self.chunks += (what,)
            index = len(self.chunks) - 1
            self.in_flight |= {index}
            self.outbox.append(do.Submit(index, self.offer, self.peer, what.pages, index, index, index + 1))
        else:
            super()._send_pages(what, now)

    handlers = {**Source.handlers, asked.SendPages: _send_pages}


class WaitsForEver(Sink):
    """Has no deadline once the bytes have begun to come."""

    def _progress(self, now: float) -> bool:
        taken = super()._progress(now)
        self.timer = None
        return taken


class DropsTheTableEntryLate(RoomTable):
    """Lets a room stay in the table after it is gone."""

    def _settle(self, room: Room, now: float, before: Phase | None = None) -> None:
        cleared, room.cleared = room.cleared, False
        super()._settle(room, now, before)
        room.cleared = cleared


PLANTED = {
    "a writer that forgets an aborted room": (Machines(source=ForgetsTheAbortedRoom), "law 6"),
    "a late offer honoured after its abort": (Machines(table=HonoursALateOffer), "law 6"),
    "clear forgets the peer index": (Machines(table=ClearForgetsThePeerIndex), "law [12]"),
    "a page released on a timeout": (Machines(sink=ReleasesOnATimeout), "law 6"),
    "a page released on clear": (Machines(sink=ReleasesOnClear), "law 6"),
    "a lost link taken for a proof": (Machines(sink=TakesALostLinkForProof), "law 6"),
    "done before the bytes have landed": (Machines(source=SaysDoneTooEarly), "law [68]"),
    "a chunk submitted after the abort": (Machines(source=SubmitsAfterAbort), "law 6"),
    "no deadline while bytes come": (Machines(sink=WaitsForEver), "law 7"),
    "a gone room stays in the table": (Machines(table=DropsTheTableEntryLate), "law 2"),
}


@pytest.mark.parametrize(("machines", "law"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_is_found(machines: Machines, law: str) -> None:
    with pytest.raises(LawBroken, match=law) as found:
        explore(Scope(expiries=2, link_losses=1), machines)
    print(found.value)

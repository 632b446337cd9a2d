"""Planted bugs: each is one thing that a machine or the table could get wrong, and the explorer must find it.

`PLANTED` names for each the scope that finds it, the law that it breaks and the length of its shortest trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.delivery import Delivery
from kvroom.core.messages import Abort, Done, Message, Offer, Peer, Progress, Quiesced, Renew
from kvroom.core.phases import GIVEN_UP, TERMINAL, Event, Phase
from kvroom.core.room import Hearing, IndexEntry, Room
from kvroom.core.settings import Limits, Timeouts, Wait
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.runtime.fences import PROOFS, Declared, Fences, LostPeer, question_of
from kvroom.runtime.remote import Remote
from kvroom.wire.address import HostPort
from kvroom.wire.frames import AskFate
from kvroom_lab.explore import Deaths, Machines, Scope
from kvroom_lab.explore.scopes import REQUEST

# -- the sink ---------------------------------------------------------------------------------------------------------


class ReleasesOnATimeout(Sink):
    """Takes the end of `drain_s` for a proof."""

    def expire(self, now: float) -> None:
        if self.timer is not None and now >= self.timer.at and self.phase in GIVEN_UP:
            self._enter_terminal(Event.QUIET)
        else:
            super().expire(now)


class ReleasesOnClear(Sink):
    """Releases the pages when the engine clears the room, while a source may still write."""

    def _asked_to_clear(self, what: asked.Clear, now: float) -> None:
        super()._asked_to_clear(what, now)
        if self.phase is Phase.DRAINING:
            self._enter_terminal(Event.QUIET)

    handlers = {**Sink.handlers, asked.Clear: _asked_to_clear}


class TakesALostLinkForProof(Sink):
    """Takes a lost link for the proof that the peer no longer writes, and releases."""

    def _peer_lost(self, what: asked.PeerLost, now: float) -> None:
        super()._peer_lost(what, now)
        self.writers -= {what.peer}
        self._release_if_drained()

    handlers = {**Sink.handlers, asked.PeerLost: _peer_lost}


class TakesAnyFence(Sink):
    """Takes the fence of one source for the proof that no source writes."""

    def _fenced(self, what: asked.Fenced, now: float) -> None:
        if self.phase in GIVEN_UP:
            self.writers = frozenset()
        super()._fenced(what, now)

    handlers = {**Sink.handlers, asked.Fenced: _fenced}


class TakesAnAbortForQuiet(Sink):
    """Releases as soon as a source has sent `Abort`, while its transfers are still in flight."""

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        taken = super().receive(peer, message, now)
        if isinstance(message, Abort) and taken:
            self.writers -= {peer}
            self._release_if_drained()
        return taken


class IsDoneAfterTheFirstRank(Sink):
    """Is complete when the first of several ranks has reported all its bytes."""

    def _done(self, peer: Peer, done: Done, now: float) -> None:
        if self.phase not in GIVEN_UP and self.offer is not None:
            self.missing, self.nbytes = frozenset({peer}), self.offer.nbytes - done.nbytes
        super()._done(peer, done, now)

    hears = {**Sink.hears, Done: Hearing(_done)}


class CountsADoneTwice(Sink):
    """Counts reports, not ranks, and takes a second `Done` of the same rank for the other's.

    Both the sink and the table refuse a repeated message, so both are replaced.
    """

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Done) and self.phase is Phase.RECEIVING and peer in self.sources - self.writers:
            peer = min(self.missing)
        return super().receive(peer, message, now)


class NeverAsksAgain(Sink):
    """Puts its pages into quarantine, and never asks for the proof that would release them."""

    def _ask_again(self) -> None:
        pass


class WaitsForEver(Sink):
    """Has no deadline once the bytes have begun to come."""

    def _progress(self, peer: Peer, now: float, *, idle: bool) -> bool:
        taken = super()._progress(peer, now, idle=idle)
        self.timer = None
        return taken


class IsRevivedByProgress(Sink):
    """Goes back to RECEIVING when a room that gave up gets a report of bytes."""

    def _progress(self, peer: Peer, now: float, *, idle: bool) -> bool:
        if self.phase is Phase.DRAINING:
            self.phase = Phase.RECEIVING
        return super()._progress(peer, now, idle=idle)


class IgnoresTheFault(Sink):
    """Reports success although the checksums differ."""

    def _verified(self, what: asked.Verified, now: float) -> None:
        super()._verified(asked.Verified(error=None), now)

    handlers = {**Sink.handlers, asked.Verified: _verified}


class LivesByItsOwnRenewals(Sink):
    """Restarts the wait for its engine with each renewal."""

    def expire(self, now: float) -> None:
        renewal = self.renewal
        super().expire(now)
        if self.renewal is not None and self.renewal is not renewal:
            self._wait(Wait.WAITING, now)


class RenewsAfterItsEnd(Sink):
    """Continues to renew after it has given up before its offer."""

    def _enter_terminal(self, event: Event) -> None:
        renewal = self.renewal
        super()._enter_terminal(event)
        self.renewal = renewal


class IsDeafToTheAnswer(Sink):
    """Ignores the `Abort` that answers a renewal, because it has not offered pages yet."""

    def _aborted(self, peer: Peer, abort: Abort, now: float) -> bool:
        return peer in self.writers and super()._aborted(peer, abort, now)

    hears = {**Sink.hears, Abort: Hearing(_aborted)}


class NeverReleases(Sink):
    """Ends without releasing its pages to the engine."""

    def _enter_terminal(self, event: Event) -> None:
        super()._enter_terminal(event)
        self.outbox = [effect for effect in self.outbox if not isinstance(effect, do.ReleasePages)]


# -- the source -------------------------------------------------------------------------------------------------------


class ForgetsTheAbortedRoom(Source):
    """Answers an abort immediately, although transfers are in flight."""

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Abort) and self._delivery(peer) is not None and self.phase not in TERMINAL:
            self.outbox.append(do.Send(peer=peer, message=Quiesced(room=message.room, generation=message.generation)))
            return True
        return super().receive(peer, message, now)


class IsQuietTooEarly(Source):
    """Sends `Quiesced` when it gives up, and waits for its transfers only then."""

    def _start_draining(self, failure: Any, now: float) -> None:
        super()._start_draining(failure, now)
        if self.phase is Phase.DRAINING:
            self._send_quiesced(self.deliveries[0])


class ReleasesInFlight(Source):
    """Releases its pages when it gives up, while transfers still read them."""

    def _start_draining(self, failure: Any, now: float) -> None:
        super()._start_draining(failure, now)
        if self.phase is Phase.DRAINING:
            self._enter_terminal(Event.QUIET)

    def _landed(self, what: asked.Landed, now: float) -> None:
        if self.phase not in TERMINAL:
            super()._landed(what, now)

    handlers = {**Source.handlers, asked.Landed: _landed}


class SaysDoneTooEarly(Source):
    """Sends `Done` when the last chunk was submitted, not when it has landed."""

    def _submit_chunks(self, number: int, now: float) -> None:
        super()._submit_chunks(number, now)
        if self.chunks and self.chunks[-1].last and self.deliveries[number].in_flight:
            self._put(msgspec.structs.replace(self.deliveries[number], in_flight=frozenset()))
            self._advance(number, now)

    def _landed(self, what: asked.Landed, now: float) -> None:
        if what.transfer in self.in_flight:
            super()._landed(what, now)

    def _broke(self, what: asked.Broke, now: float) -> None:
        if what.transfer in self.in_flight:
            super()._broke(what, now)

    handlers = {**Source.handlers, asked.Landed: _landed, asked.Broke: _broke}


class SubmitsAfterAbort(Source):
    """Submits the engine's chunks after it has sent `Quiesced`."""

    def _send_pages(self, what: asked.SendPages, now: float) -> None:
        if self.phase is Phase.RELEASED and self.deliveries:
            self.chunks += (what,)
            index, delivery = len(self.chunks) - 1, self.deliveries[0]
            self._put(msgspec.structs.replace(delivery, in_flight=delivery.in_flight | {index}))
            offer, peer = delivery.offer, delivery.peer
            self.outbox.append(
                do.Submit(
                    transfer=index,
                    offer=offer,
                    peer=peer,
                    pages=what.pages,
                    pages_start=index,
                    start=index,
                    stop=index + 1,
                )
            )
        else:
            super()._send_pages(what, now)

    handlers = {**Source.handlers, asked.SendPages: _send_pages}


class WritesWithoutComparing(Source):
    """Compares its request only with offers that arrive after the engine has stated it."""

    def _identify(self, what: asked.Identify, now: float) -> None:
        Room._identify(self, what, now)

    handlers = {**Source.handlers, asked.Identify: _identify}


class ComparesNothing(Source):
    """Takes the offer of a sink that expects another request."""

    def _differs(self, deliveries: tuple[Delivery, ...], now: float) -> bool:
        return False


class TakesAnotherOffer(Source):
    """Replaces its offer by one of another generation, and no longer accounts for the first."""

    def _take_offer(self, peer: Peer, offer: Offer, now: float) -> bool:
        if self.phase in (Phase.READY, Phase.SENDING) and offer.generation != self.generation:
            self.generation = offer.generation
            self.deliveries = (Delivery(peer, offer, 0),)
            return True
        return super()._take_offer(peer, offer, now)

    hears = {**Source.hears, Offer: Source.hears[Offer]._replace(take=_take_offer)}


class IsRevivedByAnOffer(Source):
    """Takes an offer after it has failed."""

    def _take_offer(self, peer: Peer, offer: Offer, now: float) -> bool:
        if self.phase is Phase.RELEASED:
            self.phase = Phase.EXPECTED
        return super()._take_offer(peer, offer, now)

    hears = {**Source.hears, Offer: Source.hears[Offer]._replace(take=_take_offer)}


class HasWordsOfItsOwn(Source):
    """Reports a cause of its own when the other side aborts, not the cause of the abort."""

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Abort) and self._delivery(peer) is not None and self.phase not in TERMINAL:
            self._fail_locally(Cause.ABORTED, "the decode side gave up", now)
            return True
        return super().receive(peer, message, now)


class BlamesTheTransport(Source):
    """Fails immediately for a transfer that the sink refused because it gave up, and does not wait for the cause."""

    def _broke(self, what: asked.Broke, now: float) -> None:
        super()._broke(asked.Broke(transfer=what.transfer, detail=what.detail), now)

    handlers = {**Source.handlers, asked.Broke: _broke}


class ReleasesTwice(Source):
    """Releases its pages again when it is cleared after its end."""

    def _asked_to_clear(self, what: asked.Clear, now: float) -> None:
        if self.phase in TERMINAL:
            self.outbox.append(do.ReleasePages(self._pages()))
        super()._asked_to_clear(what, now)

    handlers = {**Source.handlers, asked.Clear: _asked_to_clear}


class SucceedsUnverified(Source):
    """Reports success when it has sent its checksum, before the sink has compared it."""

    def _checksummed(self, what: asked.Checksummed, now: float) -> None:
        super()._checksummed(what, now)
        if self.phase is Phase.VERIFYING:
            self._enter_terminal(Event.COMPLETE)

    handlers = {**Source.handlers, asked.Checksummed: _checksummed}


class TakesTheFirstSinkForAll(Source):
    """Does not wait for the offers of the other sinks that the first one has announced."""

    @property
    def complete(self) -> bool:
        return bool(self.deliveries)


class ReleasesWhenOneSinkIsQuiet(Source):
    """Releases its pages when nothing is in flight to one sink, while a transfer to another one reads them."""

    def _quiet(self, delivery: Delivery) -> None:
        super()._quiet(delivery)
        if self.phase in (Phase.DRAINING, Phase.QUARANTINED) and not delivery.in_flight:
            self._enter_terminal(Event.QUIET)


class MixesTheTransfersOfItsSinks(Source):
    """Gives the transfers to two sinks one number, so that the end of one is taken for the other's."""

    def _end_transfer(self, transfer: int, nbytes: int, transport: str = "") -> tuple[Delivery, int]:
        sinks = self.deliveries[0].offer.sinks
        chunk = transfer // sinks
        moving = [one.transfer(chunk) for one in self.deliveries if chunk in one.in_flight]
        return super()._end_transfer(moving[0] if moving else transfer, nbytes, transport)


class IgnoresRenewals(Source):
    """Ignores the renewals of its sink, and times out."""

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        if self.phase is not Phase.EXPECTED:
            super()._renewed(peer, message, now)

    hears = {**Source.hears, Renew: Source.hears[Renew]._replace(take=_renewed)}


class TakesAnyRenewal(Source):
    """Restarts its wait for a renewal although it has an offer and waits for its engine."""

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        if self.phase is Phase.READY:
            self._wait(Wait.BOOTSTRAP, now)
        else:
            super()._renewed(peer, message, now)

    hears = {**Source.hears, Renew: Source.hears[Renew]._replace(take=_renewed)}


class IsRevivedByARenewal(Source):
    """Waits for an offer again when it has failed and gets a renewal."""

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        if self.phase is Phase.RELEASED:
            self.phase = Phase.EXPECTED
        super()._renewed(peer, message, now)

    hears = {**Source.hears, Renew: Source.hears[Renew]._replace(take=_renewed)}


class AnswersARenewalLikeAnOffer(Source):
    """Answers a renewal with `Quiesced` after it failed, while the offer may reach another room of this number."""

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        if self.phase is Phase.EXPECTED:
            super()._renewed(peer, message, now)
        elif self.failure is not None:
            self.outbox.append(
                do.Send(
                    peer=peer, message=Quiesced(room=message.room, generation=message.generation, failure=self.failure)
                )
            )

    hears = {**Source.hears, Renew: Source.hears[Renew]._replace(take=_renewed)}


# -- the table --------------------------------------------------------------------------------------------------------


class HonoursALateOffer(RoomTable):
    """Takes repeated and overtaken messages, so that an offer after its own abort opens the pages again."""

    def overtaken(self, peer: Peer, seq: int) -> bool:
        return False


class TakesTheLastMessageAgain(RoomTable):
    """Ignores messages older than the last one, but takes copies of the last one."""

    def overtaken(self, peer: Peer, seq: int) -> bool:
        return super().overtaken(peer, seq + 1)


class NumbersPeersByAddress(RoomTable):
    """Keeps the count of messages by address, although a restarted process counts from the beginning."""

    def __init__(self, timeouts: Timeouts | None = None, limits: Limits | None = None) -> None:
        super().__init__(timeouts, limits)
        self.last_seq: dict[str, int] = {}

    def receive(self, peer: Peer, seq: int, message: Message, now: float) -> None:
        super().receive(peer, seq, message, now)
        if peer in self._peers and self._peers[peer].up:
            self.last_seq[peer.address] = max(seq, self.last_seq.get(peer.address, 0))

    def overtaken(self, peer: Peer, seq: int) -> bool:
        return seq <= self.last_seq.get(peer.address, 0)

    def peer_up(self, peer: Peer, now: float) -> None:
        if peer in self._peers:
            self.last_seq[peer.address] = 0
        super().peer_up(peer, now)

    def copy(self) -> NumbersPeersByAddress:
        twin = super().copy()
        assert isinstance(twin, NumbersPeersByAddress)
        twin.last_seq = dict(self.last_seq)
        return twin


class CountsOnAcrossLinks(RoomTable):
    """Continues the count of a peer's messages across links, although the new link counts from 1 again."""

    def peer_up(self, peer: Peer, now: float) -> None:
        last = self._peers[peer].last_seq if peer in self._peers else 0
        super().peer_up(peer, now)
        self._peers[peer].last_seq = last


class HearsALostPeer(RoomTable):
    """Takes messages of a link or an incarnation that is lost."""

    def receive(self, peer: Peer, seq: int, message: Message, now: float) -> None:
        known = self._peers.get(peer)
        if known is None or known.up:
            super().receive(peer, seq, message, now)
        else:
            known.up = True
            super().receive(peer, seq, message, now)
            known.up = False


class TakesARestartForProof(RoomTable):
    """Takes the link of a new incarnation for the proof that the old one no longer writes."""

    def peer_up(self, peer: Peer, now: float) -> None:
        for other in [known for known in self._peers if known.address == peer.address and known != peer]:
            self.fenced(other, now)
        super().peer_up(peer, now)


class IgnoresTheGeneration(RoomTable):
    """Finds the room of a message by its number, whatever its generation."""

    def _find(self, message: Message) -> Room | None:
        if isinstance(message, Done | Progress | Quiesced | Abort):
            rooms: Iterable[Room] = (room for room in self if room.generation is not None)
            return next(iter(rooms), None)
        return super()._find(message)


class IsSilentForAGoneRoom(RoomTable):
    """Does not answer an abort for a room that is not open here."""

    def _receive_for_none(self, peer: Peer, message: Message, now: float) -> bool:
        return not isinstance(message, Abort) and super()._receive_for_none(peer, message, now)


class KeepsAnAbortedOffer(RoomTable):
    """Answers the abort of an early offer, and keeps the offer."""

    def _receive_for_none(self, peer: Peer, message: Message, now: float) -> bool:
        early = self._early.copy()
        taken = super()._receive_for_none(peer, message, now)
        if isinstance(message, Abort):
            self._early = early
        return taken


class KeepsOffersOfALostPeer(RoomTable):
    """Keeps the early offers of a peer after its link is lost."""

    def peer_lost(self, peer: Peer, detail: str, now: float) -> None:
        early = self._early.copy()
        super().peer_lost(peer, detail, now)
        self._early = early


class TakesARenewalForAnOffer(RoomTable):
    """Keeps a renewal for a room that is not open here yet."""

    def _receive_for_none(self, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Renew):
            message = Offer(
                room=message.room, generation=message.generation, start=0, stop=0, pages=(), identity=REQUEST
            )
        return super()._receive_for_none(peer, message, now)


class RefusesWhileTheOldOneDrains(RoomTable):
    """Refuses a number whose room is cleared but still drains."""

    def open(self, room: Room, number: int, generation: int | None, now: float) -> None:
        for other in self:
            other.cleared, was = False, other.cleared
            try:
                super().open(room, number, generation, now)
            finally:
                other.cleared = was
            return
        super().open(room, number, generation, now)


class OpensANumberTwice(RoomTable):
    """Opens a number while its room is not cleared."""

    def open(self, room: Room, number: int, generation: int | None, now: float) -> None:
        cleared = [other.cleared for other in self]
        rooms = list(self)
        for other in rooms:
            other.cleared = True
        super().open(room, number, generation, now)
        for other, was in zip(rooms, cleared, strict=True):
            other.cleared = was


class ClearForgetsThePeerIndex(RoomTable):
    """Removes a room and leaves its entry in the peer index."""

    def _file(self, room: Room, index_entry: IndexEntry) -> None:
        super()._file(room, index_entry._replace(peers=room.index_entry.peers) if room.gone else index_entry)


class LeavesTheTimer(RoomTable):
    """Removes a room and leaves its timer in the queue."""

    def _file(self, room: Room, index_entry: IndexEntry) -> None:
        super()._file(room, index_entry._replace(timer=room.index_entry.timer) if room.gone else index_entry)


class DropsTheTableEntryLate(RoomTable):
    """Keeps a room in the table after it is gone."""

    def _settle(self, room: Room, now: float, before: Phase | None = None) -> None:
        cleared, room.cleared = room.cleared, False
        super()._settle(room, now, before)
        room.cleared = cleared


# -- the fences -------------------------------------------------------------------------------------------------------


class BelievesAnotherMachine(Fences):
    """Accepts a statement from a manager that cannot see the process."""

    def _accept_witness(self, witness: Peer, about: AskFate) -> None:
        for peer in [peer for peer, lost in self.lost.items() if question_of(lost.process) == about]:
            _believe(self, peer)


class BelievesAWordAboutAnother(Fences):
    """Takes the end of any process on the machine for the end of the lost one."""

    def _accept_witness(self, witness: Peer, about: AskFate) -> None:
        seen = self._peers.remotes[witness].identity.process
        for peer in [peer for peer, lost in self.lost.items() if seen.sees(lost.process)]:
            _believe(self, peer)


class TakesANewcomerForProof(Fences):
    """Takes another process at the same address for the proof that the lost one has ended."""

    def relinked(self, peer: Peer) -> bool:
        for other in [other for other in self.lost if other.address == peer.address and other != peer]:
            _believe(self, other)
        return super().relinked(peer)


class DeclaresWhatIsLinked(Fences):
    """Applies the operator's statement to a peer that is linked again."""

    def declare_gone(self, where: HostPort | str) -> list[Declared]:
        for peer, lost in list(self.lost.items()):
            self.lost[peer] = lost._replace(witness="operator")
            self.fence(peer)
        return []


class DoesNotWaitForTheLastBytes(Fences):
    """Takes a statement for the whole proof, and does not ask the transport for bytes in flight."""

    def _break_with(self, lost: LostPeer, others: frozenset[str]) -> bool:
        return lost.witness != PROOFS[0] or super()._break_with(lost, others)


class NeverAsksAWitness(Fences):
    """Never asks a witness about a lost process, and waits for a statement that no peer sends unasked."""

    def _ask_about(self, lost: LostPeer) -> None:
        pass


class ForgetsAWord(Fences):
    """Forgets statements about the process when the transport connects after the loss."""

    def lose(self, peer: Peer, remote: Remote, handle: int) -> None:
        self.lost[peer] = LostPeer(handle, remote.host, remote.identity.process, frozenset(), set())


def _believe(fences: Fences, peer: Peer) -> None:
    if peer not in fences._peers.remotes and fences.lost[peer].witness == PROOFS[0]:
        fences.lost[peer] = fences.lost[peer]._replace(witness="machine")
        fences.fence(peer)


class Planted(NamedTuple):
    """One bug: the replaced parts, the world in which it is found, the law that it breaks, the length of its trace."""

    machines: Machines
    scope: Scope | Deaths
    law: str
    steps: int

    @property
    def bug(self) -> type:
        """Return the mutant itself: the last one, if another mutant is needed to reach it."""
        mutants = [new for new, old in zip(self.machines, Machines(), strict=True) if new is not old]
        return mutants[-1]


ONE = Scope(chunks=1, expiries=1, losses=0, drops=False, aborts=False)
LOSS = Scope(chunks=1, expiries=0, losses=1, drops=False, aborts=False)
TWICE = Scope(chunks=1, openings=2, expiries=0, losses=0, drops=False, aborts=False)
CRASH = Scope(chunks=1, expiries=0, losses=0, crashes=1, drops=False, aborts=False)
RANKS = Scope(sources=2, chunks=1, expiries=0, losses=0, drops=False, aborts=False)
RANKS_CRASH = Scope(sources=2, chunks=1, expiries=0, losses=0, crashes=1, drops=False, aborts=False)
CHECKED = Scope(chunks=1, checksum=True, expiries=0, losses=0, drops=False, aborts=False)
ENFORCED = Scope(chunks=1, enforcing=True, expiries=0, losses=0, drops=False, aborts=False)
SLOW = Scope(chunks=1, expiries=3, slow_offers=True, losses=0, drops=False, aborts=False)
SOURCE_TWICE = Scope(reopens="source", chunks=1, expiries=1, slow_offers=True, losses=0, drops=False, aborts=False)
SINK_TWICE = Scope(reopens="sink", chunks=1, expiries=1, slow_offers=True, losses=0, drops=False, aborts=False)
TOGETHER = Scope(sinks=2, together=True, chunks=1, expiries=0, losses=0, drops=False, aborts=False)
DIFFERS = Scope(differs=True, chunks=1, expiries=0, losses=1, drops=True, aborts=False)
DIFFERS_LATE = Scope(states_late=True, differs=True, chunks=1, expiries=0, losses=1, drops=False, aborts=False)
WORKERS = Scope(sinks=2, chunks=1, expiries=0, losses=0, drops=False, aborts=False)
A_WITNESS, ELSEWHERE = Deaths(witness="here"), Deaths(witness="there")
A_NEWCOMER, AN_OPERATOR = Deaths(newcomer="there"), Deaths(operator=True, losses=2)

PLANTED = [
    Planted(Machines(sink=ReleasesOnATimeout), ONE, "law 6", 8),
    Planted(Machines(sink=ReleasesOnClear), ONE, "law 6", 7),
    Planted(Machines(sink=TakesALostLinkForProof), LOSS, "law 6", 7),
    Planted(Machines(sink=TakesAnyFence), RANKS_CRASH, "law 6", 9),
    Planted(Machines(sink=TakesAnAbortForQuiet), ONE, "law 6", 8),
    Planted(Machines(sink=IsDoneAfterTheFirstRank), RANKS, "law 8", 8),
    Planted(Machines(sink=CountsADoneTwice, table=TakesTheLastMessageAgain), RANKS, "law 8", 9),
    Planted(Machines(sink=NeverAsksAgain), LOSS, "law 2", 4),
    Planted(Machines(sink=WaitsForEver), Scope(expiries=0, losses=0), "law 7", 8),
    Planted(Machines(sink=IsRevivedByProgress), Scope(expiries=0, losses=0, drops=False), "law 4", 9),
    Planted(Machines(sink=IgnoresTheFault), CHECKED, "law 8", 10),
    Planted(Machines(sink=LivesByItsOwnRenewals), SLOW, "law 7", 2),
    Planted(Machines(sink=RenewsAfterItsEnd), SLOW, "law 1", 3),
    Planted(Machines(sink=IsDeafToTheAnswer), SLOW, "law 11", 7),
    Planted(Machines(sink=NeverReleases), ONE, "law 2", 1),
    Planted(Machines(source=ForgetsTheAbortedRoom), ONE, "law 6", 9),
    Planted(Machines(source=IsQuietTooEarly), ONE, "law 6", 8),
    Planted(Machines(source=ReleasesInFlight), ONE, "law 6", 7),
    Planted(Machines(source=SaysDoneTooEarly), ONE, "law 6", 6),
    Planted(Machines(source=SubmitsAfterAbort), ONE, "law 6", 8),
    Planted(Machines(source=ComparesNothing), DIFFERS, "law 8", 6),
    Planted(Machines(source=WritesWithoutComparing), DIFFERS_LATE, "law 8", 7),
    Planted(Machines(source=TakesAnotherOffer), WORKERS, "law 6", 11),
    Planted(Machines(source=IsRevivedByAnOffer), ONE, "law 4", 6),
    Planted(Machines(source=HasWordsOfItsOwn), ONE, "law 11", 7),
    Planted(Machines(source=BlamesTheTransport), ENFORCED, "law 11", 8),
    Planted(Machines(source=ReleasesTwice), ONE, "law 6", 3),
    Planted(Machines(source=SucceedsUnverified), CHECKED, "law 8", 8),
    Planted(Machines(source=TakesTheFirstSinkForAll), TOGETHER, "law 8", 7),
    Planted(Machines(source=ReleasesWhenOneSinkIsQuiet), TOGETHER, "law 6", 11),
    Planted(Machines(source=MixesTheTransfersOfItsSinks), TOGETHER, "law 8", 12),
    Planted(Machines(source=IgnoresRenewals), SLOW, "law 7", 6),
    Planted(Machines(source=TakesAnyRenewal), SINK_TWICE, "law 7", 10),
    Planted(Machines(source=IsRevivedByARenewal), SLOW, "law 4", 6),
    Planted(Machines(source=AnswersARenewalLikeAnOffer), SOURCE_TWICE, "law 6", 12),
    Planted(Machines(table=HonoursALateOffer), ONE, "law 6", 8),
    Planted(Machines(table=TakesTheLastMessageAgain), TWICE, "law 6", 8),
    Planted(Machines(table=NumbersPeersByAddress), CRASH, "law 7", 7),
    Planted(Machines(table=CountsOnAcrossLinks), LOSS, "law 7", 8),
    Planted(Machines(table=HearsALostPeer), LOSS, "law 3", 4),
    Planted(Machines(table=TakesARestartForProof), CRASH, "law 6", 9),
    Planted(Machines(table=IgnoresTheGeneration), ONE, "law 3", 2),
    Planted(Machines(table=IsSilentForAGoneRoom), ONE, "law 2", 5),
    Planted(Machines(table=KeepsAnAbortedOffer), ONE, "law 6", 9),
    Planted(Machines(table=KeepsOffersOfALostPeer), LOSS, "law 3", 5),
    Planted(Machines(table=TakesARenewalForAnOffer), SLOW, "law 6", 10),
    Planted(Machines(table=RefusesWhileTheOldOneDrains), TWICE, "law 2", 5),
    Planted(Machines(table=OpensANumberTwice), ONE, "law 3", 1),
    Planted(Machines(table=ClearForgetsThePeerIndex), ONE, "law 1", 3),
    Planted(Machines(table=LeavesTheTimer), ONE, "law 1", 2),
    Planted(Machines(table=DropsTheTableEntryLate), ONE, "law 2", 2),
    Planted(Machines(fences=BelievesAnotherMachine), ELSEWHERE, "law 6", 5),
    Planted(Machines(fences=BelievesAWordAboutAnother), A_WITNESS, "law 6", 5),
    Planted(Machines(fences=TakesANewcomerForProof), A_NEWCOMER, "law 6", 4),
    Planted(Machines(fences=DeclaresWhatIsLinked), AN_OPERATOR, "law 6", 6),
    Planted(Machines(fences=DoesNotWaitForTheLastBytes), AN_OPERATOR, "law 6", 5),
    Planted(Machines(fences=NeverAsksAWitness), Deaths(newcomer="here"), "law 2", 1),
    Planted(Machines(fences=ForgetsAWord), AN_OPERATOR, "law 2", 4),
]

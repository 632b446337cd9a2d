"""The prefill side of a room: it takes the offers, submits the engine's chunks, and reports when nothing is in flight.

The report is final: after `Done` or `Quiesced` nothing is ever submitted for that generation again.
"""

# Theory of operation
#
# A source has one `Delivery` for each sink that has offered. `in_flight` of a delivery holds the chunks whose transfers
# have not ended. A transfer ends with `Landed` or `Broke`, and both mean that it neither reads nor writes any longer.
# Below, P is the source, and S and T are sinks. Names in CamelCase without quotes are mutants of
# tests/core/mutants.py, names in snake_case are bugs of tests/runtime/planted.py or tests.
#
# 1. `Done` and `Quiesced` are sent only when nothing is in flight. P submits, S aborts, P answers `Quiesced`
#    immediately: S releases its pages, and P's transfer lands in the KV cache of the next request. IsQuietTooEarly,
#    ForgetsTheAbortedRoom, SaysDoneTooEarly, a_source_says_quiet_while_it_writes,
#    test_a_source_says_quiet_only_when_nothing_is_in_flight.
# 2. Nothing is submitted after them. P takes the offer, times out because its engine has posted no chunk, and sends
#    `Quiesced`; then the engine, which has not polled yet, posts a chunk. If P submitted it, S would have released the
#    pages that it writes to. So `_send_pages` drops chunks of a room that gave up. SubmitsAfterAbort.
# 3. P's own pages are released when no transfer to any sink reads them. P's engine clears the room while a transfer
#    reads: ReleasesInFlight, a_source_releases_what_is_still_read. The transfer to S breaks while the one to T still
#    reads the same pages: ReleasesWhenOneSinkIsQuiet. Pages are released once: a room that has timed out is cleared,
#    and a second release would free pages that another request has by then. ReleasesTwice.
# 4. A delivery is never replaced. S offers and P submits to it; then a sink of another decode worker offers the same
#    number. If P answered only for the new one, no room would account for the transfer to S. The other sink gets
#    `Quiesced` with `RoomInUse`. TakesAnotherOffer, test_a_second_decode_worker_in_the_same_room_is_told_so.
# 5. A room that failed takes no offer. P times out and S offers afterwards: P answers with its cause, so that S ends
#    immediately and with the same sentence. IsRevivedByAnOffer,
#    test_an_offer_after_the_prefill_has_failed_gets_its_cause.
# 6. A `Renew` is answered by `Abort`, never by `Quiesced`. P has timed out. S sends `Renew`, and P answers; P's engine
#    clears the room and opens the number again; S, before it gets the answer, offers its pages, and the new room takes
#    the offer and writes. If the answer was `Quiesced`, S takes it for the proof that P does not write, and releases.
#    AnswersARenewalLikeAnOffer.
# 7. A `Renew` restarts the wait for the first offer, and nothing else. S's engine has no pages for longer than P's
#    `bootstrap_s`: P would fail a room that is still wanted (IgnoresRenewals). S offers, ends, and opens the number
#    again: its renewal reaches a room that has its offer and waits for its own engine, and must not extend that wait
#    (TakesAnyRenewal). A room that failed is not opened again by it (IsRevivedByARenewal).
# 8. Identities are compared before the first submit, whichever of the two comes first. A client gave one room number to
#    two prompts of equal length. If the offer is here when the engine states its request, a comparison in `_take_offer`
#    alone would let P write another prompt's KV cache. ComparesNothing, WritesWithoutComparing.
# 9. A room is over when every announced sink has everything. S has all bytes before T offers; P would succeed, release
#    its pages, and have nothing to write to T. TakesTheFirstSinkForAll. What fails for one fails for all: a request
#    whose decode ranks do not all have their part cannot continue. Until all have offered, no other event restarts the
#    deadline (`_restart`), or a sink that never offers would keep the room open.
# 10. A transfer's number contains the delivery's. P writes the same chunk to S and T, and T's transfer lands first:
#     with one number for both, P would send `Done` to S, whose bytes have not landed. MixesTheTransfersOfItsSinks.
# 11. A transfer that was refused because S ended its grant fails nothing yet. S clears its room; P's transfer breaks
#     before S's `Abort` arrives. P waits up to `drain_s` for it, so that both sides name the cause that S noticed.
#     BlamesTheTransport, test_a_transfer_that_the_sink_refused_waits_for_the_sink_to_say_why. P's engine gets the
#     cause of an `Abort` unchanged: HasWordsOfItsOwn, an_abort_is_told_in_other_words.
# 12. With checksums, P succeeds when S has agreed. P sends `Done` with its checksum, S finds another: P would report
#     success for a request that S fails. SucceedsUnverified,
#     test_a_source_ends_with_the_verdict_of_the_peer_that_offered.
# 13. An `Abort` is answered each time that it comes. `Quiesced` is lost with the link, S repeats its `Abort` after the
#     link is up again, and a source that answered only once would leave S's pages in quarantine. When the room is gone,
#     the table answers in its place (rule 6 of core/table.py).

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvroom.errors import LocalRoomError

from . import effects as do
from . import inputs as asked
from .causes import Cause
from .delivery import Delivery, Stage
from .identity import KVIdentity, mismatch
from .messages import Abort, ChecksumsAgree, Decline, Done, Failure, Message, Offer, Peer, Progress, Quiesced, Renew
from .phases import ENDED, GIVEN_UP, SOURCE, TERMINAL, Event, KVPoll, Phase, Side
from .room import Hearing, Room, RoomListener
from .settings import Timeouts, Wait


class Source(Room):
    """The prefill side: takes an offer from each sink, submits the engine's chunks, and reports when none is in flight.

    The offers state how many sinks the room serves (`Offer.sinks`). Each is served as soon as its offer has arrived.
    A failure for one sink fails the room: a request whose decode ranks do not all have their part cannot continue.
    """

    side = Side.SOURCE
    table = SOURCE

    def __init__(
        self, timeouts: Timeouts, listener: RoomListener | None = None, identity: KVIdentity | None = None
    ) -> None:
        super().__init__(timeouts, listener, identity)
        self.deliveries: tuple[Delivery, ...] = ()  # one for each sink that has offered
        self.chunks: tuple[asked.SendPages, ...] = ()  # what the engine posted, in order
        self.ready_at = 0.0  # when the last chunk could first be submitted: it and an offer were here
        self.told: frozenset[Peer] = frozenset()  # sinks that know the failure: they declined, or asked after it

    def knows(self, generation: int) -> bool:
        return any(delivery.offer.generation == generation for delivery in self.deliveries)

    def involved(self) -> frozenset[Peer]:
        if self.phase in TERMINAL:
            return frozenset()
        return frozenset(delivery.peer for delivery in self.deliveries if delivery.stage is not Stage.OVER)

    @property
    def peer_identity(self) -> KVIdentity | None:
        return self.deliveries[0].offer.identity if self.deliveries else None

    @property
    def position(self) -> int:
        """Return the end of the tokens that the engine has posted so far."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def complete(self) -> bool:
        """Return True if every sink that this rank serves has offered."""
        return bool(self.deliveries) and len(self.deliveries) == self.deliveries[0].offer.sinks

    @property
    def decode_prefix_len(self) -> int | None:
        """Return the number of leading tokens that every sink has already, or None until all offers have arrived."""
        return min(delivery.offer.start for delivery in self.deliveries) if self.complete else None

    @property
    def answered(self) -> bool:
        """Return True if every decode rank of this room has sent something, and so will get the cause of a failure."""
        heard = len(self.deliveries) + len(self.told)
        return heard >= (self.deliveries[0].offer.sinks if self.deliveries else 1)

    @property
    def transports(self) -> tuple[str, ...]:
        """Return the names of the transports that moved the landed bytes, without repeats."""
        return tuple(dict.fromkeys(delivery.transport for delivery in self.deliveries if delivery.transport))

    @property
    def in_flight(self) -> frozenset[int]:
        """Return the numbers of the transfers in flight."""
        return frozenset(one.transfer(chunk) for one in self.deliveries for chunk in one.in_flight)

    def _status(self) -> KVPoll:
        if self.phase in (Phase.SENDING, Phase.VERIFYING):
            return KVPoll.Transferring
        return KVPoll.WaitingForInput if self.complete else KVPoll.Bootstrapping

    def _pages(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(page for chunk in self.chunks for page in chunk.pages))

    def _awaited(self) -> str:
        if not self.deliveries:
            return "a decode worker to offer pages"
        if not self.complete and self.phase not in GIVEN_UP:
            return f"all decode ranks to offer pages: {len(self.deliveries)} of {self.deliveries[0].offer.sinks} have"
        if revoked := self._names(lambda one: one.revoked):
            return f"{revoked} to send the reason why it revoked its grant"
        if self.phase is Phase.VERIFYING:
            claimed = self._names(lambda one: one.stage is Stage.CLAIMED)
            return f"{claimed} to compare the checksum" if claimed else "its own checksum"
        moving = self._names(lambda one: bool(one.in_flight))
        return f"its transfers to {moving} to end" if moving else "the engine to send further pages"

    def _names(self, which: Callable[[Delivery], bool]) -> str:
        return ", ".join(str(one.peer) for one in self.deliveries if which(one))

    def _delivery(self, peer: Peer) -> Delivery | None:
        return next((one for one in self.deliveries if one.peer == peer), None)

    def _delivery_of(self, peer: Peer, message: Message) -> Delivery | None:
        """Return the delivery to this peer if the message has its generation, else None."""
        delivery = self._delivery(peer)
        return delivery if delivery is not None and delivery.offer.generation == message.generation else None

    def _put(self, changed: Delivery) -> None:
        self.deliveries = tuple(changed if one.number == changed.number else one for one in self.deliveries)

    def _restart(self, wait: Wait, now: float) -> None:
        """Start this wait. While a sink has not offered, do nothing: the deadline for the offers stays."""
        if self.complete:
            self._wait(wait, now)

    # -- offers -------------------------------------------------------------------------------------------------------

    def _take_offer(self, peer: Peer, offer: Offer, now: float) -> bool:
        if self.knows(offer.generation):
            return False
        first = self.deliveries[0].offer if self.deliveries else offer
        # Accepted are the first offer, and those of the other ranks that the first one has announced.
        matches = offer.sinks == first.sinks and offer.length == first.length
        wanted = matches and not self.complete and self._delivery(peer) is None
        if self.phase not in ENDED and wanted:
            if self.phase is Phase.EXPECTED:
                self._fire(Event.OFFER)
                self.generation = offer.generation
            self.deliveries += (Delivery(peer, offer, len(self.deliveries)),)
            self._restart(Wait.WAITING, now)
            self.outbox.append(do.Report())
            if not self._differs(self.deliveries[-1:], now):
                self._submit_chunks(self.deliveries[-1].number, now)
            return True
        failure = self.failure
        if failure is None or self.complete:
            others = self._names(lambda one: one.peer != peer) or str(peer)
            detail = f"RoomInUse: this room is open with another decode worker ({others})"
            failure = Failure(side=self.side, phase=self.phase.name, peer=str(peer), cause=Cause.IN_USE, detail=detail)
        self.told |= {peer}
        self.outbox += [
            do.Send(peer=peer, message=Quiesced(room=offer.room, generation=offer.generation, failure=failure)),
            do.Report(),
        ]
        return True

    def _identify(self, what: asked.Identify, now: float) -> None:
        super()._identify(what, now)
        self._differs(self.deliveries, now)

    def _differs(self, deliveries: tuple[Delivery, ...], now: float) -> bool:
        """Fail the room, and return True, if one of these sinks expects another request than this side has stated."""
        for delivery in deliveries if self.identity is not None else ():
            if (error := mismatch(self._stated(), delivery.offer.identity)) is not None:
                self._fail_locally(Cause.IDENTITY, error, now, by=delivery.peer)
                return True
        return False

    def _declined(self, peer: Peer, message: Decline, now: float) -> bool:
        """Fail because a sink that this room waits for has ended before it could offer pages."""
        if self.complete or self._delivery(peer) is not None:
            return False
        self.told |= {peer}
        self._fail_with(message.failure, now)
        self.outbox.append(do.Report())
        return True

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        """Restart the wait for a sink that has no pages yet, or tell it why this room has failed.

        The answer is `Abort`, never `Quiesced`: the sink's offer may be in flight already and reach another room with
        this number, which would write (rule 6).
        """
        if self.phase is Phase.EXPECTED:
            self._wait(Wait.BOOTSTRAP, now)
        elif self.failure is not None and not self.complete:
            self.told |= {peer}
            answer = Abort(room=message.room, generation=message.generation, failure=self.failure)
            self.outbox += [do.Send(peer=peer, message=answer), do.Report()]

    # -- chunks -------------------------------------------------------------------------------------------------------

    def _send_pages(self, what: asked.SendPages, now: float) -> None:
        if self.phase in GIVEN_UP:
            return  # the engine has not polled since the room failed; its pages are not read
        if self.phase is Phase.NEW or (self.chunks and self.chunks[-1].last):
            reason = "it has no number yet" if self.phase is Phase.NEW else "the last chunk was sent already"
            raise LocalRoomError(f"room {self.number}: this chunk cannot be sent, {reason}")
        self._stated()
        start = self.position if what.start is None else what.start
        if not self.position <= start <= what.stop:
            raise LocalRoomError(
                f"room {self.number}: invalid chunk: tokens [{start}, {what.stop}) after {self.position} were sent"
            )
        self.chunks += (what if what.start == start else msgspec.structs.replace(what, start=start),)
        for number in range(len(self.deliveries)):
            self._submit_chunks(number, now)

    def _submit_chunks(self, number: int, now: float) -> None:
        """Submit the engine's posted chunks to one sink, each cut to the window that the sink offered."""
        if self.phase in GIVEN_UP or self.deliveries[number].revoked:
            return
        for index in range(self.deliveries[number].submitted, len(self.chunks)):
            delivery, chunk = self.deliveries[number], self.chunks[index]
            if (error := delivery.misfit(chunk)) is not None:
                self._fail_locally(Cause.LENGTH, error, now, by=delivery.peer)
                return
            self.ready_at = now
            submit = delivery.submit(index, chunk)
            in_flight = delivery.in_flight if submit is None else delivery.in_flight | {index}
            self._put(msgspec.structs.replace(delivery, submitted=index + 1, in_flight=in_flight))
            if submit is not None:
                self._fire(Event.SUBMIT)
                self.outbox.append(submit)
                self._restart(Wait.STALL, now)
        self.outbox.append(do.Report())
        self._advance(number, now)

    def _landed(self, what: asked.Landed, now: float) -> None:
        delivery, chunk = self._end_transfer(what.transfer, what.nbytes, what.transport)
        if self.phase in GIVEN_UP:
            self._quiet(delivery)
            return
        if not any(one.revoked for one in self.deliveries):
            self._restart(Wait.STALL if self.in_flight else Wait.WAITING, now)
        if not self._advance(delivery.number, now):
            progress = Progress(**delivery.about, tokens=self.chunks[chunk].stop, idle=not delivery.in_flight)
            self.outbox.append(do.Send(peer=delivery.peer, message=progress))

    def _broke(self, what: asked.Broke, now: float) -> None:
        delivery, _ = self._end_transfer(what.transfer, 0)
        if what.revoked and self.phase not in GIVEN_UP:
            # The sink gave up, and its `Abort` with the cause is in flight. Wait for it (rule 11).
            self._put(msgspec.structs.replace(delivery, revoked=True))
            self._restart(Wait.DRAIN, now)
            return
        if self.phase in GIVEN_UP:
            self._quiet(delivery)
        else:
            broke = f"the transfer to {delivery.peer} broke: {what.detail}"
            self._fail_locally(what.cause, broke, now, by=delivery.peer)

    def _end_transfer(self, transfer: int, nbytes: int, transport: str = "") -> tuple[Delivery, int]:
        """Count a transfer that ended. Return its delivery, now without it, and the number of its chunk."""
        if transfer not in self.in_flight:
            raise LocalRoomError(f"room {self.number}: transfer {transfer} is not in flight")
        chunk, number = divmod(transfer, self.deliveries[0].offer.sinks)
        delivery = self.deliveries[number]
        in_flight, landed = delivery.in_flight - {chunk}, delivery.nbytes + nbytes
        by = transport or delivery.transport
        self._put(msgspec.structs.replace(delivery, in_flight=in_flight, nbytes=landed, transport=by))
        self.nbytes += nbytes
        return self.deliveries[number], chunk

    # -- the end ------------------------------------------------------------------------------------------------------

    def _advance(self, number: int, now: float) -> bool:
        """Send `Done` to this sink, or compute its checksum, if all its bytes have landed. Return True if they have."""
        delivery = self.deliveries[number]
        last = bool(self.chunks) and self.chunks[-1].last and delivery.submitted == len(self.chunks)
        if not last or delivery.in_flight or delivery.revoked:
            return False
        self.took_s = now - self.ready_at
        if not delivery.offer.checksum:
            self._send_done(delivery, Stage.OVER)
        else:
            self._put(msgspec.structs.replace(delivery, stage=Stage.SUMMING))
            spans = delivery.spans(self.chunks)
            self.outbox += [
                do.Checksum(offer=delivery.offer, peer=delivery.peer, chunks=self.chunks, spans=spans),
                do.Report(),
            ]
        if self.complete and all(one.stage > Stage.MOVING for one in self.deliveries) and not self._finish_if_over():
            self._fire(Event.VERIFY)
            self._restart(Wait.STALL, now)
        return True

    def _finish_if_over(self) -> bool:
        over = self.complete and all(one.stage is Stage.OVER for one in self.deliveries)
        if over:
            self._enter_terminal(Event.COMPLETE)
        return over

    def _checksummed(self, what: asked.Checksummed, now: float) -> None:
        delivery = self.deliveries[0] if what.peer is None else self._delivery(what.peer)
        if delivery is not None and delivery.stage is Stage.SUMMING and self.phase not in GIVEN_UP:
            self._send_done(delivery, Stage.CLAIMED, what.value)
            self._restart(Wait.STALL, now)

    def _agreed(self, peer: Peer, message: ChecksumsAgree, now: float) -> bool:  # noqa: ARG002 - one shape for all messages
        delivery = self._delivery_of(peer, message)
        if delivery is None or delivery.stage is not Stage.CLAIMED or self.phase in GIVEN_UP:
            return False
        self._put(msgspec.structs.replace(delivery, stage=Stage.OVER))
        self._finish_if_over()
        return True

    def _aborted(self, peer: Peer, message: Abort, now: float) -> bool:
        delivery = self._delivery_of(peer, message)
        if delivery is None:
            return False
        self._fail_with(message.failure, now)
        if self.phase in TERMINAL or delivery.stage is Stage.OVER:  # sent before, but it may have been lost with a link
            self._send_quiesced(delivery)
        return True

    def _send_done(self, delivery: Delivery, stage: Stage, checksum: int = 0) -> None:
        self._put(msgspec.structs.replace(delivery, stage=stage))
        done = Done(
            **delivery.about,
            tokens=self.position,
            nbytes=delivery.nbytes,
            identity=self._stated(),
            aux=self.chunks[-1].aux,
            took_s=self.took_s,
            checksum=checksum,
            spans=delivery.spans(self.chunks),
            windows=delivery.windows(self.chunks),
            transport=delivery.transport,
        )
        self.outbox.append(do.Send(peer=delivery.peer, message=done))

    def _peer_lost(self, what: asked.PeerLost, now: float) -> None:
        if what.peer in self.involved():
            delivery = self._delivery(what.peer)
            # The transport must end the transfers to this peer, or the room could not drain.
            if delivery is not None and delivery.in_flight:
                self.outbox.append(do.Fence(what.peer))
            self._fail_locally(Cause.LINK_LOST, f"the link to {what.peer} was lost: {what.detail}", now)

    def _ignore(self, what: asked.Input, now: float) -> None:
        """Ignore a proof or a new link: these concern the side that is written to. A source's own transfers report."""

    def _start_draining(self, failure: Failure, now: float) -> None:
        if self.phase in (Phase.NEW, Phase.EXPECTED):
            self._enter_terminal(Event.GIVE_UP)
            return
        self._fire(Event.GIVE_UP)
        self._wait(Wait.DRAIN, now)
        for delivery in self.deliveries:
            if delivery.in_flight:
                self.outbox.append(do.Send(peer=delivery.peer, message=Abort(**delivery.about, failure=failure)))
        self.outbox.append(do.Report())
        for delivery in self.deliveries:
            self._quiet(delivery)

    def _quiet(self, delivery: Delivery) -> None:
        """After giving up, send `Quiesced` to a sink to which nothing is in flight. The last one ends the room."""
        if delivery.in_flight or self.phase not in (Phase.DRAINING, Phase.QUARANTINED):
            return
        if delivery.stage is not Stage.OVER:
            self._send_quiesced(delivery)
            self._put(msgspec.structs.replace(delivery, stage=Stage.OVER))
        if all(one.stage is Stage.OVER for one in self.deliveries):
            self._enter_terminal(Event.QUIET)

    def _send_quiesced(self, delivery: Delivery) -> None:
        self.outbox.append(do.Send(peer=delivery.peer, message=Quiesced(**delivery.about, failure=self.failure)))

    def _ask_again(self) -> None:
        self.outbox += [do.Fence(peer) for peer in sorted(self.involved())]

    handlers = {
        **Room.common_handlers,
        asked.Identify: _identify,
        asked.SendPages: _send_pages,
        asked.Landed: _landed,
        asked.Broke: _broke,
        asked.Checksummed: _checksummed,
        asked.PeerUp: _ignore,
        asked.PeerLost: _peer_lost,
        asked.Fenced: _ignore,
    }
    # A source has no generation before its first offer. Until then a message finds it by its number.
    hears = {
        Offer: Hearing(_take_offer, lambda room, offer: not room.cleared or room.knows(offer.generation)),
        Decline: Hearing(_declined, lambda room, _: not (room.cleared or room.complete)),
        Renew: Hearing(_renewed, lambda room, _: not room.cleared),
        ChecksumsAgree: Hearing(_agreed),
        Abort: Hearing(_aborted),
    }

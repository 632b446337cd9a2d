"""The prefill side of a room: it takes the offers, submits the engine's chunks, and says when nothing is in flight.

What it has said is final: after `Done` or `Quiesced` nothing is ever submitted for that generation again.
"""

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
    """The prefill side: takes an offer of each sink, submits the engine's chunks, and says when nothing is in flight.

    It serves as many sinks as their offers say (`Offer.sinks`), each as soon as its offer is here. What fails for one
    fails for all: a request whose decode ranks do not all have their part cannot be continued.
    """

    side = Side.SOURCE
    table = SOURCE

    def __init__(
        self, timeouts: Timeouts, listener: RoomListener | None = None, identity: KVIdentity | None = None
    ) -> None:
        super().__init__(timeouts, listener, identity)
        self.deliveries: tuple[Delivery, ...] = ()  # one for each sink that has offered
        self.chunks: tuple[asked.SendPages, ...] = ()  # what the engine posted, in order
        self.ready_at = 0.0  # when the last chunk was here and its offer too
        self.told: frozenset[Peer] = frozenset()  # sinks that know of the end: they declined, or their offer came later

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
        """The token after the last one that the engine has posted so far."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def complete(self) -> bool:
        """Every sink that this rank serves has offered."""
        return bool(self.deliveries) and len(self.deliveries) == self.deliveries[0].offer.sinks

    @property
    def decode_prefix_len(self) -> int | None:
        """Tokens that every sink has already; None until all offers are here."""
        return min(delivery.offer.start for delivery in self.deliveries) if self.complete else None

    @property
    def answered(self) -> bool:
        """Every decode rank that this room knows of was heard, and so will hear its end."""
        heard = len(self.deliveries) + len(self.told)
        return heard >= (self.deliveries[0].offer.sinks if self.deliveries else 1)

    @property
    def transports(self) -> tuple[str, ...]:
        """By what the bytes were moved that have landed, in words, each way once."""
        return tuple(dict.fromkeys(delivery.transport for delivery in self.deliveries if delivery.transport))

    @property
    def in_flight(self) -> frozenset[int]:
        """The numbers of the transfers under way."""
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
            return f"{revoked} to say why it took its grant back"
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
        """Return the delivery to this peer if the message is about it."""
        delivery = self._delivery(peer)
        return delivery if delivery is not None and delivery.offer.generation == message.generation else None

    def _put(self, changed: Delivery) -> None:
        self.deliveries = tuple(changed if one.number == changed.number else one for one in self.deliveries)

    def _restart(self, wait: Wait, now: float) -> None:
        """Wait anew, unless a sink has not offered yet: until all have, the deadline for that goes on."""
        if self.complete:
            self._wait(wait, now)

    # -- offers -------------------------------------------------------------------------------------------------------

    def _take_offer(self, peer: Peer, offer: Offer, now: float) -> bool:
        if self.knows(offer.generation):
            return False
        first = self.deliveries[0].offer if self.deliveries else offer
        # Wanted is the first offer, or another rank's of those that the first one has announced.
        alike = offer.sinks == first.sinks and offer.length == first.length
        wanted = alike and not self.complete and self._delivery(peer) is None
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
        """Fail if one of these sinks has offered pages for another request than the one that was stated here."""
        for delivery in deliveries if self.identity is not None else ():
            if (error := mismatch(self._stated(), delivery.offer.identity)) is not None:
                self._fail_locally(Cause.IDENTITY, error, now, by=delivery.peer)
                return True
        return False

    def _declined(self, peer: Peer, message: Decline, now: float) -> bool:
        """A sink that we wait for has ended before it could offer anything."""
        if self.complete or self._delivery(peer) is not None:
            return False
        self.told |= {peer}
        self._fail_with(message.failure, now)
        self.outbox.append(do.Report())
        return True

    def _renewed(self, peer: Peer, message: Renew, now: float) -> None:
        """A sink has no pages yet: wait for them anew, or say why nobody does.

        It is told by `Abort`, never by `Quiesced`: its offer may be under way, and reach another room of this number.
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
            return  # it ended before the engine knew: these pages are not read
        if self.phase is Phase.NEW or (self.chunks and self.chunks[-1].last):
            reason = "it has no number yet" if self.phase is Phase.NEW else "the last chunk was sent already"
            raise LocalRoomError(f"room {self.number}: nothing can be sent, {reason}")
        self._stated()
        start = self.position if what.start is None else what.start
        if not self.position <= start <= what.stop:
            raise LocalRoomError(
                f"room {self.number}: tokens [{start}, {what.stop}), after {self.position} were sent already"
            )
        self.chunks += (what if what.start == start else msgspec.structs.replace(what, start=start),)
        for number in range(len(self.deliveries)):
            self._submit_chunks(number, now)

    def _submit_chunks(self, number: int, now: float) -> None:
        """Submit to one sink what the engine has posted, cut to the window that it offered."""
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
            self._put(msgspec.structs.replace(delivery, revoked=True))
            self._restart(Wait.DRAIN, now)
            return
        if self.phase in GIVEN_UP:
            self._quiet(delivery)
        else:
            broke = f"the transfer to {delivery.peer} broke: {what.detail}"
            self._fail_locally(what.cause, broke, now, by=delivery.peer)

    def _end_transfer(self, transfer: int, nbytes: int, transport: str = "") -> tuple[Delivery, int]:
        """The delivery as it is without this transfer, and its chunk."""
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
        """Say `Done` for this sink, or compute its checksum, if all of its bytes have landed. Whether they have."""
        delivery = self.deliveries[number]
        last = bool(self.chunks) and self.chunks[-1].last and delivery.submitted == len(self.chunks)
        if not last or delivery.in_flight or delivery.revoked:
            return False
        self.took_s = now - self.ready_at
        if not delivery.offer.checksum:
            self._say_done(delivery, Stage.OVER)
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
            self._say_done(delivery, Stage.CLAIMED, what.value)
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
        if self.phase in TERMINAL or delivery.stage is Stage.OVER:  # said before, and the answer may have been lost
            self._say_quiet(delivery)
        return True

    def _say_done(self, delivery: Delivery, stage: Stage, checksum: int = 0) -> None:
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
            if delivery is not None and delivery.in_flight:
                self.outbox.append(do.Fence(what.peer))
            self._fail_locally(Cause.LINK_LOST, f"the link to {what.peer} was lost: {what.detail}", now)

    def _ignore(self, what: asked.Input, now: float) -> None:
        """Proofs and returns concern the side that is written to; our own transfers report for themselves."""

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
        """Given up: tell this sink if nothing is in flight to it any more; nothing in flight at all ends the room."""
        if delivery.in_flight or self.phase not in (Phase.DRAINING, Phase.QUARANTINED):
            return
        if delivery.stage is not Stage.OVER:
            self._say_quiet(delivery)
            self._put(msgspec.structs.replace(delivery, stage=Stage.OVER))
        if all(one.stage is Stage.OVER for one in self.deliveries):
            self._enter_terminal(Event.QUIET)

    def _say_quiet(self, delivery: Delivery) -> None:
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
    # Until its first offer a source does not know its generation: it is found by its number.
    hears = {
        Offer: Hearing(_take_offer, lambda room, offer: not room.cleared or room.knows(offer.generation)),
        Decline: Hearing(_declined, lambda room, _: not (room.cleared or room.complete)),
        Renew: Hearing(_renewed, lambda room, _: not room.cleared),
        ChecksumsAgree: Hearing(_agreed),
        Abort: Hearing(_aborted),
    }

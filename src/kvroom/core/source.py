"""The prefill side of a room: it takes one offer, submits the engine's chunks, and says when nothing is in flight.

What it has said is final: after `Done` or `Quiesced` nothing is ever submitted for that generation again.
"""

from __future__ import annotations

from kvroom.errors import LocalRoomError

from . import effects as do
from . import inputs as asked
from .causes import Cause
from .messages import Abort, Agreed, Decline, Done, Failure, Message, Offer, Peer, Progress, Quiesced
from .phases import GIVEN_UP, SOURCE, TERMINAL, Event, KVPoll, Phase
from .room import Room
from .settings import Timeouts


class Source(Room):
    """The prefill side: takes one offer, submits the engine's chunks, and says so when nothing of it is in flight."""

    side = "source"
    table = SOURCE

    def __init__(self, timeouts: Timeouts, owner: object = None) -> None:
        super().__init__(timeouts, owner)
        self.peer: Peer | None = None
        self.offer: Offer | None = None
        self.chunks: tuple[asked.SendPages, ...] = ()  # what the engine posted, in order
        self.ready_at = 0.0  # when the last chunk was here and the offer too
        self.submitted = 0  # so many of the chunks were submitted
        self.in_flight: frozenset[int] = frozenset()  # transfers, named by the index of their chunk
        self.revoked = False  # a transfer was refused because the sink has given up; its abort is under way
        self.said_done = False
        self.told: Peer | None = None  # a sink that knows of the end: it declined, or its offer came later

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        if isinstance(message, Offer):
            return self._take_offer(peer, message, now)
        if isinstance(message, Decline) and self.generation is None:
            self.told = peer
            self._end(message.failure, now)
            self.outbox.append(do.Report())
            return True
        if isinstance(message, Agreed) and peer == self.peer and self.phase is Phase.VERIFYING and self.said_done:
            self._finish(Event.COMPLETE)
            return True
        if isinstance(message, Abort) and peer == self.peer:
            if self.phase in TERMINAL:
                self._say_quiet()
            else:
                self._end(message.failure, now)
            return True
        return False

    def involved(self) -> frozenset[Peer]:
        return frozenset() if self.peer is None or self.phase in TERMINAL else frozenset({self.peer})

    @property
    def position(self) -> int:
        """Tokens that the engine has posted so far."""
        return self.chunks[-1].stop if self.chunks else 0

    @property
    def decode_prefix_len(self) -> int | None:
        """Tokens that the decode side has already; None until its offer is here."""
        return None if self.offer is None else self.offer.start

    def _status(self) -> KVPoll:
        if self.phase in (Phase.SENDING, Phase.VERIFYING):
            return KVPoll.Transferring
        return KVPoll.WaitingForInput if self.phase is Phase.READY else KVPoll.Bootstrapping

    def _pages(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(page for chunk in self.chunks for page in chunk.pages))

    def _awaited(self) -> str:
        if self.phase is Phase.EXPECTED:
            return "a decode worker to offer pages"
        if self.revoked:
            return f"{self.peer} to say why it took its grant back"
        if self.phase is Phase.VERIFYING:
            return f"{self.peer} to compare the checksum" if self.said_done else "its own checksum"
        return f"its transfers to {self.peer} to end" if self.in_flight else "the engine to send further pages"

    def _take_offer(self, peer: Peer, offer: Offer, now: float) -> bool:
        if self.generation == offer.generation:
            return False
        if self.phase is Phase.EXPECTED:
            self._fire(Event.OFFER)
            self.peer, self.generation, self.offer = peer, offer.generation, offer
            self._wait("waiting_s", now)
            self.outbox.append(do.Report())
            self._submit_chunks(now)
            return True
        failure = self.failure
        if failure is None or self.generation is not None:
            cause = f"RoomInUse: this room is open with another decode worker ({self.peer})"
            failure = Failure(self.side, self.phase.name, str(peer), cause, Cause.IN_USE)
        self.told = peer
        self.outbox += [do.Send(peer, Quiesced(offer.room, offer.generation, failure)), do.Report()]
        return True

    def _send_pages(self, what: asked.SendPages, now: float) -> None:
        if self.phase in GIVEN_UP:
            return  # it ended before the engine knew: these pages are not read
        if self.phase is Phase.NEW or (self.chunks and self.chunks[-1].last):
            reason = "it has no number yet" if self.phase is Phase.NEW else "the last chunk was sent already"
            raise LocalRoomError(f"room {self.number}: nothing can be sent, {reason}")
        if what.stop < self.position:
            raise LocalRoomError(f"room {self.number}: {what.stop} tokens, after {self.position} were sent already")
        self.chunks += (what,)
        self._submit_chunks(now)

    def _submit_chunks(self, now: float) -> None:
        """Submit what the engine has posted, cut to the window that the sink offered."""
        offer, peer = self.offer, self.peer
        if offer is None or peer is None or self.revoked:
            return
        for index in range(self.submitted, len(self.chunks)):
            chunk = self.chunks[index]
            begin = self.chunks[index - 1].stop if index else 0
            if chunk.stop > offer.stop or (chunk.last and chunk.stop != offer.stop):
                have = f"the prefill has {chunk.stop} tokens, the decode side offered pages for {offer.stop}"
                self._fail(Cause.LENGTH, have, now)
                return
            self.submitted = index + 1
            self.ready_at = now
            start = max(begin, offer.start)
            if start < chunk.stop:
                self._fire(Event.SUBMIT)
                self.in_flight |= {index}
                self.outbox.append(do.Submit(index, offer, peer, chunk.pages, begin, start, chunk.stop))
                self._wait("stall_s", now)
        self.outbox.append(do.Report())
        self._finish_if_complete(now)

    def _landed(self, what: asked.Landed, now: float) -> None:
        if what.transfer not in self.in_flight:
            raise LocalRoomError(f"room {self.number}: transfer {what.transfer} is not in flight")
        self.in_flight -= {what.transfer}
        self.nbytes += what.nbytes
        if self.phase in GIVEN_UP:
            self._release_if_drained()
            return
        if not self.revoked:
            self._wait("stall_s" if self.in_flight else "waiting_s", now)
        if not self._finish_if_complete(now):
            assert self.peer is not None  # something was in flight
            self.outbox.append(do.Send(self.peer, Progress(*self._name(), self.chunks[what.transfer].stop)))

    def _broke(self, what: asked.Broke, now: float) -> None:
        if what.transfer not in self.in_flight:
            raise LocalRoomError(f"room {self.number}: transfer {what.transfer} is not in flight")
        self.in_flight -= {what.transfer}
        if what.revoked and self.phase not in GIVEN_UP:
            self.revoked = True
            self._wait("drain_s", now)
            return
        self._fail(what.kind, f"the transfer broke: {what.cause}", now)
        self._release_if_drained()

    def _finish_if_complete(self, now: float) -> bool:
        last = bool(self.chunks) and self.chunks[-1].last and self.submitted == len(self.chunks)
        if not last or self.in_flight or self.revoked:
            return False
        assert self.peer is not None  # chunks are submitted only after the offer
        assert self.offer is not None
        self.took_s = now - self.ready_at
        if not self.offer.checksum:
            self._say_done()
            self._finish(Event.COMPLETE)
        elif self.phase is not Phase.VERIFYING:
            self._fire(Event.VERIFY)
            self._wait("stall_s", now)
            self.outbox += [do.Checksum(self.offer, self.peer, self.chunks), do.Report()]
        return True

    def _checksummed(self, what: asked.Checksummed, now: float) -> None:
        if self.phase is Phase.VERIFYING:  # else given up meanwhile
            self._say_done(what.value)
            self._wait("stall_s", now)

    def _say_done(self, checksum: int = 0) -> None:
        assert self.peer is not None  # it has taken an offer
        self.said_done = True
        done = Done(*self._name(), self.position, self.nbytes, self.chunks[-1].aux, self.took_s, checksum)
        self.outbox.append(do.Send(self.peer, done))

    def _peer_lost(self, what: asked.PeerLost, now: float) -> None:
        if what.peer in self.involved():
            if self.in_flight:
                self.outbox.append(do.Fence(what.peer))
            self._fail(Cause.LINK_LOST, f"the link to {what.peer} was lost: {what.cause}", now)

    def _ignore(self, what: asked.Input, now: float) -> None:
        """Proofs and returns concern the side that is written to; our own transfers report for themselves."""

    def _give_up(self, failure: Failure, now: float) -> None:
        if self.phase in (Phase.NEW, Phase.EXPECTED):
            self._finish(Event.GIVE_UP)
            return
        self._fire(Event.GIVE_UP)
        self._wait("drain_s", now)
        if self.in_flight:
            assert self.peer is not None
            self.outbox.append(do.Send(self.peer, Abort(*self._name(), failure)))
        self.outbox.append(do.Report())
        self._release_if_drained()

    def _release_if_drained(self) -> None:
        if not self.in_flight and self.phase in (Phase.DRAINING, Phase.QUARANTINED):
            self._finish(Event.QUIET)
            self._say_quiet()

    def _say_quiet(self) -> None:
        assert self.peer is not None  # a source drains only after it took an offer
        self.outbox.append(do.Send(self.peer, Quiesced(*self._name(), self.failure)))

    def _ask_again(self) -> None:
        self.outbox += [do.Fence(peer) for peer in sorted(self.involved())]

    handlers = {
        **Room.common_handlers,
        asked.SendPages: _send_pages,
        asked.Landed: _landed,
        asked.Broke: _broke,
        asked.Checksummed: _checksummed,
        asked.PeerUp: _ignore,
        asked.PeerLost: _peer_lost,
        asked.Fenced: _ignore,
    }

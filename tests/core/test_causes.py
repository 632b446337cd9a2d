"""Counts of ended rooms: a closed set of causes, equal on both sides, and a census that equals the rooms."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from identities import PROMPT
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import TIMED_OUT, Cause
from kvroom.core.counts import Ending
from kvroom.core.messages import Decline, Failure, Message, Offer, Peer
from kvroom.core.phases import GIVEN_UP, Phase, Side
from kvroom.core.settings import Limits, Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable

PREFILL, DECODE = Peer("prefill:1", 1), Peer("decode:1", 2)
TIMES = Timeouts(bootstrap_s=10, waiting_s=20, stall_s=30, drain_s=5)


class Two:
    """A source and a sink of room 7, each in its own table. Messages are delivered immediately and in order."""

    def __init__(self, *, tokens: int = 16, nbytes: int = 64, checksum: bool = False) -> None:
        self.prefill, self.decode = RoomTable(TIMES), RoomTable(TIMES)
        self.prefill.peer_up(DECODE, 0.0)
        self.decode.peer_up(PREFILL, 0.0)
        self.seq = 0
        self.submitted: list[int] = []
        self.source, self.sink = Source(TIMES, identity=PROMPT), Sink(TIMES, identity=PROMPT)
        self.prefill.open(self.source, 7, None, 0.0)
        self.decode.open(self.sink, 7, 70, 0.0)
        self.decode.feed(self.sink, asked.Resolved(sources=(PREFILL,)), 0.0)
        self.decode.feed(
            self.sink,
            asked.OfferPages(pages=(3,), start=0, stop=tokens, nbytes=nbytes, grant=b"leave", checksum=checksum),
            0.0,
        )
        self.talk()

    def talk(self, now: float = 0.0) -> None:
        """Deliver messages until neither side sends another."""
        while True:
            said = [(self.prefill, DECODE, one) for one in self._effects(self.decode)]
            said += [(self.decode, PREFILL, one) for one in self._effects(self.prefill)]
            if not said:
                return
            for listener, speaker, message in said:
                self.seq += 1
                listener.receive(speaker, self.seq, message, now)

    def _effects(self, table: RoomTable) -> list[Message]:
        effects = [effect for _, effect in table.take_effects()]
        self.submitted += [effect.transfer for effect in effects if isinstance(effect, do.Submit)]
        return [effect.message for effect in effects if isinstance(effect, do.Send)]

    def send(self, stop: int = 16) -> None:
        self.prefill.feed(self.source, asked.SendPages(pages=(1,), stop=stop, last=True), 0.0)
        self.talk()

    def land(self, nbytes: int = 64) -> None:
        self.prefill.feed(self.source, asked.Landed(transfer=self.submitted.pop(), nbytes=nbytes), 0.0)
        self.talk()

    def expire(self, table: RoomTable) -> None:
        at = table.deadline()
        assert at is not None
        table.expire(at)
        self.talk(at)


def abort(two: Two) -> None:
    two.prefill.feed(two.source, asked.GiveUp(detail="the client went away"), 0.0)
    two.talk()


def clear_early(two: Two) -> None:
    two.send()
    two.decode.feed(two.sink, asked.Clear(), 0.0)
    two.talk()


def wait_in_vain(two: Two) -> None:
    two.expire(two.decode)


def stall(two: Two) -> None:
    two.send()
    two.expire(two.prefill)


def lose_peers(two: Two) -> None:
    two.decode.peer_lost(PREFILL, "its host is silent", 0.0)
    two.prefill.peer_lost(DECODE, "its host is silent", 0.0)


def break_transfer(two: Two) -> None:
    two.send()
    two.prefill.feed(two.source, asked.Broke(transfer=two.submitted.pop(), detail="no such memory"), 0.0)
    two.talk()


def misfit(two: Two) -> None:
    two.send()
    two.prefill.feed(
        two.source, asked.Broke(transfer=two.submitted.pop(), detail="no plan", cause=Cause.INCOMPATIBLE), 0.0
    )
    two.talk()


def send_too_many_tokens(two: Two) -> None:
    two.send(stop=17)


def send_too_few_bytes(two: Two) -> None:
    two.send()
    two.land(nbytes=63)


ENDS: list[tuple[Callable[[Two], None], Cause]] = [
    (abort, Cause.ABORTED),
    (clear_early, Cause.CLEARED),
    (wait_in_vain, Cause.WAITING),
    (stall, Cause.STALL),
    (lose_peers, Cause.LINK_LOST),
    (break_transfer, Cause.TRANSFER),
    (misfit, Cause.INCOMPATIBLE),
    (send_too_many_tokens, Cause.LENGTH),
]


@pytest.mark.parametrize(("end", "cause"), ENDS, ids=[end.__name__ for end, _ in ENDS])
def test_both_sides_count_the_same_cause(end: Callable[[Two], None], cause: Cause) -> None:
    two = Two()
    end(two)
    assert two.source.failure is not None
    assert two.sink.failure is not None
    assert two.prefill.counters.ended == {Ending(Side.SOURCE, cause): 1}
    assert two.decode.counters.ended == {Ending(Side.SINK, cause): 1}
    assert two.prefill.counters.failed_by_cause == two.decode.counters.failed_by_cause == {cause: 1}


def test_a_source_that_has_succeeded_stays_so_when_the_bytes_do_not_suffice() -> None:
    two = Two()
    send_too_few_bytes(two)
    assert two.prefill.counters.ended == {Ending(Side.SOURCE, None): 1}
    assert two.decode.counters.ended == {Ending(Side.SINK, Cause.LENGTH): 1}


def test_a_checksum_that_differs_is_a_cause_of_its_own() -> None:
    two = Two(checksum=True)
    two.send()
    two.land()
    two.prefill.feed(two.source, asked.Checksummed(value=1), 0.0)
    two.talk()
    two.decode.feed(two.sink, asked.Verified(error="1 there, 2 here"), 0.0)
    two.talk()
    assert two.prefill.counters.failed_by_cause == two.decode.counters.failed_by_cause == {Cause.CHECKSUM: 1}


def test_a_success_is_counted_by_its_side() -> None:
    two = Two()
    two.send()
    two.land()
    assert two.prefill.counters.ended == {Ending(Side.SOURCE, None): 1}
    assert two.decode.counters.ended == {Ending(Side.SINK, None): 1}
    assert two.decode.counters.failed_by_cause == {}


def test_every_deadline_has_its_cause() -> None:
    assert set(Timeouts.__struct_fields__) - {wait.value for wait in TIMED_OUT} == {
        "decline_s",
        "offer_s",
        "renew_s",
    }  # these waits time out no room
    assert len(set(TIMED_OUT.values())) == len(TIMED_OUT)


@pytest.mark.parametrize("early", [False, True], ids=["open", "not open yet"])
def test_a_second_offer_is_refused_as_in_use(early: bool) -> None:
    table = RoomTable(TIMES)
    table.peer_up(DECODE, 0.0)
    if not early:
        table.open(Source(TIMES, identity=PROMPT), 7, None, 0.0)
    table.receive(DECODE, 1, Offer(room=7, generation=70, start=0, stop=16, pages=(3,), identity=PROMPT), 0.0)
    table.take_effects()
    table.receive(DECODE, 2, Offer(room=7, generation=71, start=0, stop=16, pages=(3,), identity=PROMPT), 0.0)
    assert refusals(table) == [Cause.IN_USE]


def test_early_offers_over_a_limit_or_too_old_say_so() -> None:
    table = RoomTable(TIMES, Limits(early_arrivals=1))
    table.peer_up(DECODE, 0.0)
    for seq in (1, 2):
        table.receive(DECODE, seq, Offer(room=seq, generation=70, start=0, stop=16, pages=(3,), identity=PROMPT), 0.0)
    assert refusals(table) == [Cause.LIMIT]
    table.expire(TIMES.bootstrap_s)
    assert refusals(table) == [Cause.BOOTSTRAP]


def refusals(table: RoomTable) -> list[Cause]:
    sent = [effect.message for _, effect in table.take_effects() if isinstance(effect, do.Send)]
    return [message.failure.cause for message in sent if getattr(message, "failure", None)]  # type: ignore[union-attr]


def test_a_cause_that_nobody_knows_is_no_message() -> None:
    failure = Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="gone", cause=Cause.STALL)
    raw = msgspec.msgpack.encode(Decline(room=7, generation=70, failure=failure))
    assert msgspec.msgpack.decode(raw, type=Message).failure == failure
    changed = raw.replace(b"stall_timeout", b"stall_full_up")
    assert changed != raw
    with pytest.raises(msgspec.ValidationError, match="stall_full_up"):
        msgspec.msgpack.decode(changed, type=Message)


def phases(table: RoomTable) -> dict[str, int]:
    return {
        f"{side.name.lower()} {phase.name}": n
        for side, counts in table.census().rooms.items()
        for phase, n in counts.items()
        if n
    }


def test_the_census_follows_every_room() -> None:
    two = Two()
    assert phases(two.decode) == {"sink OFFERED": 1}
    assert phases(two.prefill) == {"source READY": 1}
    two.send()
    assert phases(two.prefill) == {"source SENDING": 1}
    two.decode.feed(two.sink, asked.GiveUp(detail="enough"), 0.0)
    two.expire(two.decode)
    assert phases(two.decode) == {"sink QUARANTINED": 1}
    assert two.decode.census().quarantined_pages == len(two.sink.held_pages) == 1
    assert two.decode.copy().census() == two.decode.census()
    two.decode.fenced(PREFILL, 5.0)
    assert phases(two.decode) == {"sink RELEASED": 1}
    assert two.decode.census().quarantined_pages == 0
    assert two.sink.phase in GIVEN_UP
    two.decode.feed(two.sink, asked.Clear(), 5.0)
    assert two.decode.census().kept == 0
    two.decode.feed(two.sink, asked.Clear(), 5.0)
    assert two.decode.census().kept == 0
    assert two.decode.audit().empty


def test_a_census_that_no_room_accounts_for_is_found_by_the_audit() -> None:
    two = Two()
    two.decode._census[Side.SINK][Phase.LANDED] += 1
    assert two.decode.audit().inconsistent == 1


def test_namesakes_are_the_rooms_with_a_number() -> None:
    two = Two()
    two.decode.feed(two.sink, asked.Clear(), 0.0)
    again = Sink(TIMES, identity=PROMPT)
    two.decode.open(again, 7, 71, 0.0)
    assert two.decode.namesakes(7) == [two.sink, again]  # the first one drains
    assert two.decode.namesakes(8) == []

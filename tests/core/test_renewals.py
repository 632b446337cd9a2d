"""Renewals of a sink without pages, and the waits of its sources: the state machines and the table alone."""

from __future__ import annotations

import itertools

import pytest

from identities import PROMPT
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import Abort, Decline, Failure, Message, Offer, Peer, Quiesced, Renew
from kvroom.core.phases import SOURCE, KVPoll, Phase, Side
from kvroom.core.room import Room, Timer
from kvroom.core.settings import Timeouts, Wait
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable

ONE, TWO, STRANGER = Peer("one:1", 1), Peer("two:1", 2), Peer("stranger:1", 3)
TIMES = Timeouts(bootstrap_s=10, waiting_s=20, stall_s=30, drain_s=5, offer_s=1, renew_s=4)
WHY = Failure(side=Side.SOURCE, phase="EXPECTED", peer="none yet", detail="the prompt is too long", cause=Cause.ABORTED)
PAGES = asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640)


class HalfRoom:
    """A table with linked peers, and its effects."""

    def __init__(self) -> None:
        self.table = RoomTable(TIMES)
        self.seq = itertools.count(1)
        for peer in (ONE, TWO, STRANGER):
            self.table.peer_up(peer, 0.0)

    def sent(self) -> list[do.Send]:
        return [effect for _, effect in self.table.take_effects() if isinstance(effect, do.Send)]

    def hear(self, peer: Peer, message: Message, now: float = 0.0) -> None:
        self.table.receive(peer, next(self.seq), message, now)

    def sink(self, now: float = 0.0, number: int = 7) -> Sink:
        """A sink with two sources, whose engine has not offered pages."""
        room = Sink(TIMES, identity=PROMPT)
        self.table.open(room, number, number * 10, now)
        self.table.feed(room, asked.Resolved(sources=(ONE, TWO)), now)
        return room

    def source(self) -> Source:
        room = Source(TIMES, identity=PROMPT)
        self.table.open(room, 7, None, 0.0)
        return room


# -- the sink ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_offers_at_once_costs_no_further_message() -> None:
    side = HalfRoom()
    room = side.sink()
    side.table.expire(0.9)
    side.table.feed(room, PAGES, 0.9)
    assert {type(send.message) for send in side.sent()} == {Offer}
    assert (room.renewal, side.table.deadline()) == (None, 20.9)


def test_pages_that_are_there_before_the_links_are_offered_and_nothing_is_renewed() -> None:
    side, room = HalfRoom(), Sink(TIMES, identity=PROMPT)
    side.table.open(room, 7, 70, 0.0)
    side.table.feed(room, PAGES, 0.0)
    side.table.expire(9.0)
    assert (side.sent(), side.table.deadline()) == ([], 10.0)
    side.table.feed(room, asked.Resolved(sources=(ONE, TWO)), 9.0)
    assert {type(send.message) for send in side.sent()} == {Offer}
    assert (room.renewal, side.table.deadline()) == (None, 29.0)


def test_a_sink_renews_with_all_its_sources_until_it_offers_and_what_it_repeats_may_be_dropped() -> None:
    side = HalfRoom()
    room = side.sink()
    for at in (1.0, 5.0, 9.0):
        assert side.table.deadline() == at
        side.table.expire(at)
        assert side.sent() == [
            do.Send(peer=peer, message=Renew(room=7, generation=70), again=True) for peer in (ONE, TWO)
        ]
    side.table.feed(room, PAGES, 9.5)
    assert {type(send.message) for send in side.sent()} == {Offer}
    side.table.expire(25.0)
    assert side.sent() == []


def test_its_own_deadline_comes_when_it_would_without_renewals() -> None:
    side = HalfRoom()
    room = side.sink()
    for at in (1.0, 5.0, 9.0, 13.0, 17.0, 19.9):
        side.table.expire(at)
        assert room.timer == Timer(Wait.WAITING, 20.0)
    side.sent()
    side.table.expire(20.0)
    assert room.failure is not None
    assert room.failure.detail == "timed out after 20 s (waiting_s) waiting for the engine to offer pages"
    assert {type(send.message) for send in side.sent()} == {Decline}
    side.table.feed(room, asked.Clear(), 20.0)
    assert side.table.audit().empty


def test_a_deadline_and_a_renewal_that_come_together_end_the_room_and_say_nothing_again() -> None:
    side = HalfRoom()
    room = side.sink()
    side.table.expire(100.0)
    assert (room.phase, room.renewal) == (Phase.RELEASED, None)
    assert {type(send.message) for send in side.sent()} == {Decline}


def test_after_a_pause_one_renewal_is_said_not_all_that_were_missed() -> None:
    side = HalfRoom()
    room = side.sink()
    side.table.expire(15.0)
    assert [type(send.message) for send in side.sent()] == [Renew, Renew]
    assert room.renewal == Timer(Wait.RENEW, 19.0)


def test_rooms_that_came_at_different_times_renew_and_end_in_their_order() -> None:
    side = HalfRoom()
    rooms = [side.sink(float(number), number) for number in range(4)]
    said: list[tuple[float, int]] = []
    for _ in range(100):
        if (at := side.table.deadline()) is None:
            break
        side.table.expire(at)
        said += [(at, send.message.room) for send in side.sent() if isinstance(send.message, Renew)]
    assert sorted(said) == said
    for number, room in enumerate(rooms):
        assert [at - number for at, of in said if of == number][::2] == [1.0, 5.0, 9.0, 13.0, 17.0]
        assert room.history[-1].at == 20.0 + number


def test_a_source_that_has_failed_ends_the_sink_which_tells_the_others_and_not_it() -> None:
    side = HalfRoom()
    room = side.sink()
    side.table.expire(1.0)
    side.sent()
    side.hear(ONE, Abort(room=7, generation=70, failure=WHY), 1.0)
    assert (room.phase, room.failure) == (Phase.RELEASED, WHY)
    assert side.sent() == [do.Send(peer=TWO, message=Decline(room=7, generation=70, failure=WHY))]
    side.table.feed(room, asked.Clear(), 1.0)
    assert side.table.audit().empty


@pytest.mark.parametrize(
    "message",
    [Quiesced(room=7, generation=70, failure=WHY), Abort(room=7, generation=71, failure=WHY)],
    ids=["no abort", "another generation"],
)
def test_nothing_else_is_taken_before_the_offer(message: Message) -> None:
    side = HalfRoom()
    room = side.sink()
    side.hear(ONE, message)
    assert (room.phase, room.failure) == (Phase.OPENED, None)


def test_a_stranger_does_not_end_a_sink() -> None:
    side = HalfRoom()
    room = side.sink()
    side.hear(STRANGER, Abort(room=7, generation=70, failure=WHY))
    assert (room.phase, side.table.counters.late_messages) == (Phase.OPENED, 1)


def test_the_answer_to_a_renewal_that_meets_an_offered_room_proves_no_drain() -> None:
    """The offer was in flight: the source may have opened the number again and write."""
    side = HalfRoom()
    room = side.sink()
    side.table.feed(room, PAGES, 0.0)
    side.sent()
    side.hear(ONE, Abort(room=7, generation=70, failure=WHY))
    assert (room.phase, room.held_pages, room.failure) == (Phase.DRAINING, (3, 4), WHY)
    assert side.sent() == [do.Send(peer=peer, message=Abort(room=7, generation=70, failure=WHY)) for peer in (ONE, TWO)]


# -- the source -------------------------------------------------------------------------------------------------------


def test_a_renewal_puts_off_the_end_of_a_source_that_waits_for_the_offer() -> None:
    side = HalfRoom()
    room = side.source()
    for now in (6.0, 15.0, 24.9):
        side.hear(ONE, Renew(room=7, generation=70), now)
        side.table.expire(now + 9.9)
        assert (room.phase, room.timer) == (Phase.EXPECTED, Timer(Wait.BOOTSTRAP, now + 10.0))
    assert (side.table.counters.renewals, side.table.counters.late_messages) == (3, 0)
    side.table.expire(34.9)
    assert room.failure is not None
    assert room.failure.detail == "timed out after 10 s (bootstrap_s) waiting for a decode worker to offer pages"


def source_in(phase: Phase) -> tuple[HalfRoom, Room]:
    """Return a source that serves ONE and is in this phase."""
    side = HalfRoom()
    room = side.source()
    side.hear(
        ONE,
        Offer(
            room=7,
            generation=70,
            start=0,
            stop=20,
            pages=(3, 4),
            identity=PROMPT,
            grant=b"",
            checksum=phase is Phase.VERIFYING,
        ),
    )
    if phase is not Phase.READY:
        side.table.feed(room, asked.SendPages(pages=(1, 2), stop=20, last=True), 0.0)
    if phase in (Phase.VERIFYING, Phase.SENT):
        side.table.feed(room, asked.Landed(transfer=0, nbytes=640), 0.0)
    if phase in (Phase.DRAINING, Phase.QUARANTINED, Phase.RELEASED):
        side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    if phase is Phase.QUARANTINED:
        side.table.expire(5.0)
    if phase is Phase.RELEASED:
        side.table.feed(room, asked.Landed(transfer=0, nbytes=640), 0.0)
    side.table.take_effects()
    return side, room


@pytest.mark.parametrize("phase", [phase for phase in SOURCE if phase not in (Phase.NEW, Phase.EXPECTED)])
def test_a_renewal_changes_nothing_once_the_offers_are_here(phase: Phase) -> None:
    side, room = source_in(phase)
    assert room.phase is phase
    before = (room.phase, room.timer, room.failure, side.table.audit())
    for peer, generation in ((ONE, 70), (ONE, 71), (TWO, 72)):
        side.hear(peer, Renew(room=7, generation=generation), 1.0)
    assert (room.phase, room.timer, room.failure, side.table.audit()) == before
    assert side.table.take_effects() == []
    assert side.table.counters.late_messages == 0


def test_a_rank_that_has_no_pages_yet_does_not_put_off_the_end_of_a_room_that_another_has_offered_to() -> None:
    side = HalfRoom()
    room = side.source()
    side.hear(ONE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT, sinks=2))
    side.hear(TWO, Renew(room=7, generation=71), 6.0)
    assert (room.phase, room.timer) == (Phase.READY, Timer(Wait.BOOTSTRAP, 10.0))


@pytest.mark.parametrize("was_open", [False, True])
def test_a_renewal_for_a_room_that_is_not_open_is_counted_and_not_kept(was_open: bool) -> None:
    side = HalfRoom()
    if was_open:
        side.table.feed(side.source(), asked.Clear(), 0.0)
    side.table.take_effects()
    side.hear(ONE, Renew(room=7, generation=70))
    assert side.table.take_effects() == []
    assert side.table.audit().empty
    assert (side.table.counters.renewals, side.table.counters.late_messages) == (0, 1)
    room = side.source()
    assert (room.phase, room.timer) == (Phase.EXPECTED, Timer(Wait.BOOTSTRAP, 10.0))


def test_a_room_that_has_failed_and_is_not_cleared_tells_a_sink_that_renews_why() -> None:
    side = HalfRoom()
    room = side.source()
    side.table.feed(room, asked.GiveUp(detail="the prompt is too long"), 0.0)
    side.table.take_effects()
    assert room.failure is not None
    answered = [room.answered]
    side.hear(ONE, Renew(room=7, generation=70))
    answered.append(room.answered)
    assert side.sent() == [do.Send(peer=ONE, message=Abort(room=7, generation=70, failure=room.failure))]
    assert (room.phase, room.status) == (Phase.RELEASED, KVPoll.Failed)
    assert room.told == {ONE}
    assert answered == [False, True]


def test_both_sides_end_with_the_words_of_the_side_that_failed() -> None:
    prefill, decode = HalfRoom(), HalfRoom()
    source, sink = prefill.source(), decode.sink()
    prefill.table.feed(source, asked.GiveUp(detail="the prompt is too long"), 0.5)
    prefill.table.take_effects()
    decode.table.expire(1.0)
    prefill.hear(TWO, decode.sent()[0].message, 1.0)
    (answer,) = prefill.sent()
    decode.hear(ONE, answer.message, 1.0)
    assert sink.failure == source.failure
    assert sink.status is KVPoll.Failed

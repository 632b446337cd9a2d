"""The laws one by one, on the state machines and the table, without threads or sockets."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from identities import PROMPT
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.counts import Audit
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import (
    Abort,
    ChecksumsAgree,
    Decline,
    Done,
    Failure,
    Message,
    Offer,
    Peer,
    Progress,
    Quiesced,
    Window,
)
from kvroom.core.phases import GIVEN_UP, SINK, SOURCE, TERMINAL, Event, KVPoll, Phase, Side
from kvroom.core.room import Room
from kvroom.core.settings import Limits, Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.errors import ConfigurationError, LimitExceeded, LocalRoomError, RoomInUse

PREFILL, DECODE, OTHER = Peer("prefill:1", 1), Peer("decode:1", 2), Peer("decode:2", 3)
TIMES = Timeouts(bootstrap_s=10, waiting_s=20, stall_s=30, drain_s=5)
GRANT = b"leave"


class HalfRoom:
    """A table with linked peers, and shorthands for the calls of a test."""

    def __init__(self, *peers: Peer, limits: Limits | None = None) -> None:
        self.table = RoomTable(TIMES, limits)
        self.seq = itertools.count(1)
        for peer in peers:
            self.table.peer_up(peer, 0.0)
        self.effects()

    def effects(self) -> list[do.Effect]:
        return [effect for _, effect in self.table.take_effects()]

    def said(self) -> list[Message]:
        return [effect.message for effect in self.effects() if isinstance(effect, do.Send)]

    def hear(self, peer: Peer, message: Message, now: float = 0.0) -> None:
        self.table.receive(peer, next(self.seq), message, now)

    def sink(self, number: int = 7, generation: int = 70, *, sources: tuple[Peer, ...] = (PREFILL,)) -> Sink:
        room = Sink(TIMES, identity=PROMPT)
        self.table.open(room, number, generation, 0.0)
        self.table.feed(room, asked.Resolved(sources=sources), 0.0)
        return room

    def offered(
        self,
        number: int = 7,
        generation: int = 70,
        *,
        sources: tuple[Peer, ...] = (PREFILL,),
        checksum: bool = False,
    ) -> Sink:
        room = self.sink(number, generation, sources=sources)
        self.table.feed(
            room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640, grant=GRANT, checksum=checksum), 0.0
        )
        self.effects()
        return room

    def source(self, number: int = 7) -> Source:
        room = Source(TIMES, identity=PROMPT)
        self.table.open(room, number, None, 0.0)
        return room

    def sending(self, number: int = 7, generation: int = 70, *, checksum: bool = False) -> Source:
        """A source with one transfer of [0, 16) in flight."""
        room = self.source(number)
        self.hear(
            DECODE,
            Offer(
                room=number,
                generation=generation,
                start=0,
                stop=20,
                pages=(3, 4),
                identity=PROMPT,
                grant=GRANT,
                checksum=checksum,
            ),
        )
        self.table.feed(room, asked.SendPages(pages=(1,), stop=16), 0.0)
        self.effects()
        return room


def sink_side() -> HalfRoom:
    return HalfRoom(PREFILL, OTHER)


def source_side() -> HalfRoom:
    return HalfRoom(DECODE, OTHER)


def sink_in(phase: Phase) -> tuple[HalfRoom, Room]:
    """Return a sink that has just entered this phase."""
    side = sink_side()
    if phase is Phase.NEW:
        return side, Sink(TIMES, identity=PROMPT)
    if phase is Phase.OPENED:
        return side, side.sink()
    room = side.offered(checksum=phase is Phase.VERIFYING)
    if phase in (Phase.RECEIVING, Phase.VERIFYING, Phase.LANDED):
        side.hear(PREFILL, Progress(room=7, generation=70, tokens=16))
    if phase in (Phase.VERIFYING, Phase.LANDED):
        side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=640, identity=PROMPT))
    if phase in GIVEN_UP:
        side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    if phase is Phase.QUARANTINED:
        side.table.expire(5.0)
    if phase is Phase.RELEASED:
        side.hear(PREFILL, Quiesced(room=7, generation=70))
    return side, room


def source_in(phase: Phase) -> tuple[HalfRoom, Room]:
    """Return a source that has just entered this phase."""
    side = source_side()
    if phase is Phase.NEW:
        return side, Source(TIMES, identity=PROMPT)
    if phase in (Phase.EXPECTED, Phase.READY):
        room = side.source()
        if phase is Phase.READY:
            side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
        return side, room
    room = side.sending(checksum=phase is Phase.VERIFYING)
    if phase in GIVEN_UP:
        side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    if phase is Phase.QUARANTINED:
        side.table.expire(5.0)
    if phase in (Phase.VERIFYING, Phase.SENT):
        side.table.feed(room, asked.SendPages(pages=(2,), stop=20, last=True), 0.0)
    if phase in (Phase.VERIFYING, Phase.SENT, Phase.RELEASED):
        end_flights(side, room)
    return side, room


def end_flights(side: HalfRoom, room: Room) -> None:
    """Let every transfer of a source land."""
    for transfer in sorted(getattr(room, "in_flight", ())):
        side.table.feed(room, asked.Landed(transfer=transfer, nbytes=320), 0.0)


EVERY_PHASE = [(sink_in, phase) for phase in SINK] + [(source_in, phase) for phase in SOURCE]
in_every_phase = pytest.mark.parametrize(
    ("make", "phase"), EVERY_PHASE, ids=[f"{make.__name__[:-3]}-{phase.name}" for make, phase in EVERY_PHASE]
)
Make = Callable[[Phase], tuple[HalfRoom, Room]]


@in_every_phase
def test_the_rooms_above_are_where_they_should_be(make: Make, phase: Phase) -> None:
    assert make(phase)[1].phase is phase


# -- law 2: clear is total and idempotent -----------------------------------------------------------------------------


@in_every_phase
def test_clear_in_any_phase_and_twice_leaves_nothing(make: Make, phase: Phase) -> None:
    side, room = make(phase)
    for _ in range(2):
        side.table.feed(room, asked.Clear(), 0.0)
    end_flights(side, room)
    side.hear(PREFILL, Quiesced(room=7, generation=70))
    assert room.gone
    assert side.table.audit() == Audit()
    assert len(side.table) == 0


@in_every_phase
def test_pages_are_released_exactly_once(make: Make, phase: Phase) -> None:
    side, room = make(phase)
    effects = side.effects()
    for _ in range(2):
        side.table.feed(room, asked.Clear(), 0.0)
        end_flights(side, room)
        side.hear(PREFILL, Quiesced(room=7, generation=70))
    effects += side.effects()
    assert sum(isinstance(effect, do.ReleasePages) for effect in effects) == 1


# -- law 3: no resurrection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Progress(room=7, generation=70, tokens=1),
        Done(room=7, generation=70, tokens=20, nbytes=640, identity=PROMPT),
        Abort(
            room=7,
            generation=70,
            failure=Failure(side=Side.SOURCE, phase="x", peer="y", detail="z", cause=Cause.ABORTED),
        ),
        Quiesced(room=7, generation=70),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_for_a_room_that_is_gone_changes_nothing_and_is_counted(message: Message) -> None:
    side = sink_side()
    room = side.offered()
    side.table.feed(room, asked.Clear(), 0.0)
    side.hear(PREFILL, Quiesced(room=7, generation=70))
    late = side.table.counters.late_messages
    side.hear(PREFILL, message)
    assert side.table.audit() == Audit()
    assert side.table.counters.late_messages == late + (not isinstance(message, Abort))


def test_a_message_of_another_generation_changes_nothing() -> None:
    side = sink_side()
    room = side.offered()
    side.hear(PREFILL, Done(room=7, generation=71, tokens=20, nbytes=640, identity=PROMPT))
    assert room.phase is Phase.OFFERED
    assert side.table.counters.late_messages == 1


def test_a_message_of_a_peer_that_is_no_source_of_this_room_changes_nothing() -> None:
    side = sink_side()
    room = side.offered()
    side.hear(OTHER, Done(room=7, generation=70, tokens=20, nbytes=640, identity=PROMPT))
    assert room.phase is Phase.OFFERED


def test_an_offer_that_its_own_abort_has_overtaken_is_ignored() -> None:
    side = source_side()
    side.table.receive(
        DECODE,
        2,
        Abort(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
        0.0,
    )
    side.table.receive(DECODE, 1, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT), 0.0)
    room = side.source()
    assert room.phase is Phase.EXPECTED
    assert side.table.counters.overtaken_messages == 1


# -- law 4: transitions are a table -----------------------------------------------------------------------------------


@in_every_phase
def test_an_unlisted_event_raises_and_changes_nothing(make: Make, phase: Phase) -> None:
    room = make(phase)[1]
    timer = room.timer
    for event in set(Event) - set(room.table[phase]):
        with pytest.raises(LocalRoomError, match=f"{event.name} is not allowed on the {room.side.value} side"):
            room._fire(event)
        assert (room.phase, room.timer) == (phase, timer)


@pytest.mark.parametrize("table", [SINK, SOURCE], ids=["sink", "source"])
def test_phases_only_go_forward_and_terminal_phases_absorb(table: dict[Phase, dict[Event, Phase]]) -> None:
    order = {phase: rank for rank, phase in enumerate(Phase)}
    for phase, events in table.items():
        assert (phase in TERMINAL) == (not events)
        for after in events.values():
            forward = order[after] > order[phase] or after is phase
            assert forward or (phase, after) == (Phase.QUARANTINED, Phase.RELEASED)


@pytest.mark.parametrize(
    ("room", "what"),
    [
        (Sink(TIMES, identity=PROMPT), asked.SendPages(pages=(1,), stop=1)),
        (Source(TIMES, identity=PROMPT), asked.OfferPages(pages=(1,), start=0, stop=1, nbytes=1)),
        (Source(TIMES, identity=PROMPT), asked.SendPages(pages=(1,), stop=1)),
        (Source(TIMES, identity=PROMPT), asked.Landed(transfer=0, nbytes=1)),
        (Source(TIMES, identity=PROMPT), asked.Broke(transfer=0, detail="x")),
        (Sink(TIMES, identity=PROMPT), asked.OfferPages(pages=(1,), start=0, stop=1, nbytes=1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_input_that_the_side_or_phase_does_not_allow_raises_and_changes_nothing(
    room: Room, what: asked.Input
) -> None:
    with pytest.raises(LocalRoomError):
        room.handle(what, 0.0)
    assert room.phase is Phase.NEW
    assert room.take_effects() == []


# -- law 5: status has no side effects --------------------------------------------------------------------------------


@in_every_phase
def test_reading_the_status_changes_nothing(make: Make, phase: Phase) -> None:
    side, room = make(phase)
    side.effects()
    before = (side.table.audit(), room.timer)
    assert (room.status is KVPoll.Failed) == (phase in GIVEN_UP)
    assert (room.phase, side.effects()) == (phase, [])
    assert (side.table.audit(), room.timer) == before


# -- law 6: no page is released before it is drained ------------------------------------------------------------------


def test_a_timeout_quarantines_pages_and_only_proof_releases_them() -> None:
    side = sink_side()
    room = side.offered()
    side.table.feed(room, asked.Clear(), 1.0)
    side.effects()
    side.table.expire(6.0)
    effects = side.effects()
    assert do.Quarantine(pages=(3, 4)) in effects
    assert do.Fence(PREFILL) in effects
    assert not any(isinstance(effect, do.ReleasePages) for effect in effects)
    assert side.table.audit().quarantined_pages == 2
    side.hear(PREFILL, Quiesced(room=7, generation=70))
    assert do.ReleasePages((3, 4)) in side.effects()
    assert side.table.audit() == Audit()


def test_an_overdue_drain_is_asked_for_again_and_again() -> None:
    side = sink_side()
    room = side.offered()
    side.table.feed(room, asked.Clear(), 0.0)
    side.effects()
    for now in (5.0, 10.0, 15.0):
        side.table.expire(now)
        assert [type(message) for message in side.said()] == [Abort]


@pytest.mark.parametrize("proof", [asked.Revoked(), asked.Fenced(peer=PREFILL)], ids=["revoked", "fenced"])
def test_the_transport_can_prove_a_drain(proof: asked.Input) -> None:
    side = sink_side()
    room = side.offered()
    side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    assert do.Revoke(GRANT) in side.effects()
    side.table.feed(room, proof, 0.0)
    assert room.phase is Phase.RELEASED


def test_a_source_says_quiet_only_when_nothing_is_in_flight() -> None:
    side = source_side()
    room = side.sending()
    side.hear(
        DECODE,
        Abort(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
    )
    assert not any(isinstance(message, Quiesced) for message in side.said())
    assert room.status is KVPoll.Failed
    side.table.feed(room, asked.Broke(transfer=0, detail="refused"), 0.0)
    assert [type(message) for message in side.said()] == [Quiesced]


def test_an_abort_for_a_room_that_the_source_does_not_know_is_answered_at_once() -> None:
    side = source_side()
    side.hear(
        DECODE,
        Abort(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
    )
    assert [type(message) for message in side.said()] == [Quiesced]
    assert side.table.audit() == Audit()


# -- law 7: every room ends -------------------------------------------------------------------------------------------


@in_every_phase
def test_with_everybody_silent_every_room_ends(make: Make, phase: Phase) -> None:
    side, room = make(phase)
    if phase is Phase.NEW:
        side.table.open(room, 7, 70, 0.0)
    side.table.expire(30.0)
    assert room.status in (KVPoll.Failed, KVPoll.Success)


def test_a_lost_link_ends_the_rooms_of_that_peer_and_no_other() -> None:
    side = sink_side()
    mine, others = side.offered(7, 70), side.offered(8, 80, sources=(OTHER,))
    side.table.peer_lost(PREFILL, "connection reset", 0.0)
    assert mine.status is KVPoll.Failed
    assert others.status is KVPoll.WaitingForInput


@pytest.mark.parametrize(
    ("linked", "offered", "detail"),
    [
        (False, False, "timed out after 10 s (bootstrap_s) waiting for links to its sources"),
        (True, False, "timed out after 20 s (waiting_s) waiting for the engine to offer pages"),
        (True, True, "timed out after 20 s (waiting_s) waiting for the first bytes from prefill:1"),
    ],
)
def test_a_sink_says_what_did_not_come(linked: bool, offered: bool, detail: str) -> None:
    side = sink_side()
    room = Sink(TIMES, identity=PROMPT)
    side.table.open(room, 7, 70, 0.0)
    if linked:
        side.table.feed(room, asked.Resolved(sources=(PREFILL,)), 0.0)
    if offered:
        side.table.feed(room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640, grant=GRANT), 0.0)
    side.table.expire(9.9)
    assert room.status is not KVPoll.Failed
    side.table.expire(20.0)
    assert room.failure is not None
    assert room.failure.detail == detail


def test_a_deadline_that_has_not_come_changes_nothing() -> None:
    room = source_in(Phase.SENDING)[1]
    room.expire(29.9)
    assert room.phase is Phase.SENDING


def test_losing_a_peer_that_concerns_nobody_changes_nothing() -> None:
    side = sink_side()
    mine = side.offered(sources=(PREFILL,))
    side.table.peer_lost(Peer("stranger:1", 9), "gone", 0.0)
    side.table.feed(mine, asked.PeerLost(peer=OTHER, detail="gone"), 0.0)
    side.table.feed(mine, asked.PeerUp(peer=OTHER), 0.0)
    assert mine.phase is Phase.OFFERED


def test_a_peer_that_is_fenced_ends_the_rooms_that_still_wait_for_it() -> None:
    side = sink_side()
    waiting, done = side.offered(7, 70, sources=(PREFILL, OTHER)), side.offered(8, 80, sources=(PREFILL, OTHER))
    side.hear(PREFILL, Done(room=8, generation=80, tokens=20, nbytes=320, identity=PROMPT))
    assert side.table.concerns(PREFILL)
    side.table.fenced(PREFILL, 0.0)
    assert not side.table.concerns(PREFILL)
    assert waiting.failure is not None
    assert waiting.failure.detail == "prefill:1 was cut off before it had sent everything"
    assert done.phase is Phase.RECEIVING


def test_a_fence_after_the_end_of_a_source_is_no_concern_of_it() -> None:
    side = source_side()
    room = side.sending()
    side.table.feed(room, asked.Fenced(peer=DECODE), 0.0)
    side.table.feed(room, asked.PeerLost(peer=OTHER, detail="gone"), 0.0)
    assert room.phase is Phase.SENDING


def test_links_that_come_up_twice_or_after_an_offered_room_ended_change_nothing() -> None:
    side = sink_side()
    room = side.offered()
    side.table.feed(room, asked.Resolved(sources=(OTHER,)), 0.0)
    assert room.sources == {PREFILL}
    side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    side.hear(PREFILL, Quiesced(room=7, generation=70))
    side.effects()
    side.table.feed(room, asked.Resolved(sources=(OTHER,)), 0.0)
    assert side.effects() == []


def test_a_sink_needs_a_source_and_a_window() -> None:
    side = sink_side()
    room = Sink(TIMES, identity=PROMPT)
    side.table.open(room, 7, 70, 0.0)
    with pytest.raises(LocalRoomError, match="a sink needs at least one source"):
        side.table.feed(room, asked.Resolved(sources=()), 0.0)
    with pytest.raises(LocalRoomError, match=r"invalid window: tokens \[5, 4\)"):
        side.table.feed(room, asked.OfferPages(pages=(3,), start=5, stop=4, nbytes=0), 0.0)
    assert (room.phase, room.sources, room.offer) == (Phase.OPENED, frozenset(), None)


def test_pages_that_come_after_the_room_has_ended_were_never_shown_and_give_back_their_grant() -> None:
    side = sink_side()
    room = side.sink()
    side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    side.effects()
    side.table.feed(room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640, grant=GRANT), 0.0)
    assert side.effects() == [do.Revoke(GRANT)]


def test_a_sink_takes_no_message_that_only_a_source_can_take() -> None:
    side = sink_side()
    room = side.offered()
    assert not room.receive(PREFILL, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT), 0.0)
    side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
    assert not room.receive(PREFILL, Progress(room=7, generation=70, tokens=16), 0.0)


def test_chunks_go_forward() -> None:
    side = source_side()
    room = side.sending()
    with pytest.raises(LocalRoomError, match=r"\[16, 8\) after 16 were sent"):
        side.table.feed(room, asked.SendPages(pages=(2,), stop=8), 0.0)
    assert len(room.chunks) == 1


def test_a_landing_after_a_refused_transfer_does_not_put_off_the_deadline() -> None:
    side = source_side()
    room = side.sending()
    side.table.feed(room, asked.SendPages(pages=(2,), stop=20, last=True), 0.0)
    side.table.feed(room, asked.Broke(transfer=0, detail="no such grant", revoked=True), 0.0)
    side.table.feed(room, asked.Landed(transfer=1, nbytes=64), 4.0)
    side.table.expire(5.0)
    assert room.status is KVPoll.Failed


# -- law 8: success means all bytes -----------------------------------------------------------------------------------


def test_success_needs_every_source_once() -> None:
    side = sink_side()
    room = side.offered(sources=(PREFILL, OTHER))
    side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT))
    side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT))
    assert room.status.name == "Transferring"
    side.hear(OTHER, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT, aux=b"first token"))
    assert room.status is KVPoll.Success
    assert room.aux == b"first token"
    assert do.ReleasePages((3, 4)) in side.effects()


@pytest.mark.parametrize(
    ("done", "detail"),
    [
        (
            Done(room=7, generation=70, tokens=19, nbytes=640, identity=PROMPT),
            "prefill:1 sent tokens up to 19, the offer was for 20",
        ),
        (
            Done(room=7, generation=70, tokens=20, nbytes=639, identity=PROMPT),
            "the sources sent 639 bytes, the offer was for 640",
        ),
    ],
    ids=["tokens", "bytes"],
)
def test_a_count_that_differs_is_a_failure(done: Done, detail: str) -> None:
    side = sink_side()
    room = side.offered()
    side.hear(PREFILL, done)
    assert room.status is KVPoll.Failed
    assert room.failure is not None
    assert room.failure.detail == detail
    assert room.phase is Phase.RELEASED  # the source sent Done, so it no longer writes


@pytest.mark.parametrize(("stop", "last"), [(21, False), (19, True)])
def test_the_source_refuses_a_length_that_was_not_offered(stop: int, last: bool) -> None:
    side = source_side()
    room = side.sending()
    side.table.feed(room, asked.SendPages(pages=(2,), stop=stop, last=last), 0.0)
    assert room.failure is not None
    assert room.failure.detail == f"the prefill side has {stop} tokens, the decode side offered pages for 20"


def test_tokens_that_the_sink_has_already_are_not_sent() -> None:
    side = source_side()
    room = side.source()
    side.hear(DECODE, Offer(room=7, generation=70, start=18, stop=20, pages=(4,), identity=PROMPT))
    side.table.feed(room, asked.SendPages(pages=(1,), stop=16), 0.0)
    assert not any(isinstance(effect, do.Submit) for effect in side.effects())
    side.table.feed(room, asked.SendPages(pages=(2,), stop=20, last=True), 0.0)
    (submit,) = [effect for effect in side.effects() if isinstance(effect, do.Submit)]
    assert (submit.pages_start, submit.start, submit.stop) == (16, 18, 20)
    assert room.decode_prefix_len == 18


def test_a_full_hit_moves_nothing_and_still_completes() -> None:
    side = source_side()
    room = side.source()
    side.table.feed(room, asked.SendPages(pages=(1, 2), stop=20, last=True, aux=b"t"), 0.0)
    side.hear(DECODE, Offer(room=7, generation=70, start=20, stop=20, pages=(), identity=PROMPT))
    assert room.status is KVPoll.Success
    assert side.said() == [Done(room=7, generation=70, tokens=20, nbytes=0, identity=PROMPT, aux=b"t")]


# -- law 9: nothing unbounded -----------------------------------------------------------------------------------------


def test_early_arrivals_have_limits_and_the_answer_names_them() -> None:
    side = HalfRoom(DECODE, OTHER, limits=Limits(early_arrivals=3, early_arrivals_per_peer=2))
    for number in range(3):
        side.hear(DECODE, Offer(room=number, generation=number, start=0, stop=1, pages=(1,), identity=PROMPT))
    assert [message.failure.detail for message in side.said() if isinstance(message, Quiesced) and message.failure] == [
        "2 early arrivals of decode:1 are waiting already (Limits.early_arrivals_per_peer)"
    ]
    for number in range(3, 5):
        side.hear(OTHER, Offer(room=number, generation=number, start=0, stop=1, pages=(1,), identity=PROMPT))
    assert [message.failure.detail for message in side.said() if isinstance(message, Quiesced) and message.failure] == [
        "3 early arrivals are waiting already (Limits.early_arrivals)"
    ]
    assert side.table.audit().early_arrivals == 3
    assert side.table.counters.early_refused == 2


def large_offer(number: int, pages: int = 100) -> Offer:
    return Offer(room=number, generation=number, start=0, stop=1, pages=(2**31,) * pages, identity=PROMPT)


def test_early_offers_have_a_budget_of_bytes_and_the_answer_names_it() -> None:
    each = large_offer(0).kept_bytes
    side = HalfRoom(DECODE, OTHER, limits=Limits(early_bytes=3 * each, early_bytes_per_peer=2 * each))
    for number in range(3):
        side.hear(DECODE, large_offer(number))
    assert [message.failure for message in side.said() if isinstance(message, Quiesced)] == [
        Failure(
            side=Side.SOURCE,
            phase="EXPECTED",
            peer="decode:1",
            detail=f"this offer takes {each} bytes beside {2 * each} bytes of early offers of decode:1, "
            f"and the limit is {2 * each} (Limits.early_bytes_per_peer)",
            cause=Cause.LIMIT,
        )
    ]
    for number in range(3, 5):
        side.hear(OTHER, large_offer(number))
    assert [message.failure.detail for message in side.said() if isinstance(message, Quiesced) and message.failure] == [
        f"this offer takes {each} bytes beside {3 * each} bytes of early offers, and the limit is {3 * each} "
        "(Limits.early_bytes)"
    ]
    audit = side.table.audit()
    assert (audit.early_arrivals, audit.inconsistent, side.table.counters.early_refused) == (3, 0, 2)


@pytest.mark.parametrize("end", ["taken", "aborted", "expired", "lost"])
def test_the_bytes_of_an_early_offer_are_free_again_when_it_goes(end: str) -> None:
    each = large_offer(0).kept_bytes
    side = HalfRoom(DECODE, OTHER, limits=Limits(early_bytes=each, early_bytes_per_peer=each))
    side.hear(DECODE, large_offer(1))
    if end == "taken":
        side.source(1)
    elif end == "aborted":
        side.hear(
            DECODE,
            Abort(
                room=1,
                generation=1,
                failure=Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="enough", cause=Cause.ABORTED),
            ),
        )
    elif end == "expired":
        side.table.expire(10.0)
    else:
        side.table.peer_lost(DECODE, "reset", 0.0)
    side.effects()
    side.hear(OTHER, large_offer(2))
    assert side.said() == []
    assert [message.room for message in side.table.early_messages() if isinstance(message, Offer)] == [2]
    assert side.table.audit().inconsistent == 0


@pytest.mark.parametrize(
    "offer",
    [
        large_offer(1, 50_000),
        Offer(
            room=1,
            generation=1,
            start=0,
            stop=1,
            pages=(),
            identity=PROMPT,
            windows=tuple(Window(f"group {i}", (2**31,) * 1000) for i in range(64)),
        ),
        Offer(
            room=1,
            generation=1,
            start=0,
            stop=1,
            pages=(),
            identity=PROMPT,
            parts=((2**40, 2**41, 2**42, 2**43),) * 4096,
        ),
        Offer(
            room=1,
            generation=1,
            start=0,
            stop=1,
            pages=(),
            identity=KVIdentity(tuple((f"{i:064}", f"{i:064}") for i in range(32))),
            grant=b"g" * 4096,
        ),
    ],
    ids=["pages", "windows", "parts", "texts"],
)
def test_what_an_offer_is_said_to_take_is_what_it_takes(offer: Offer) -> None:
    raw, decoder = msgspec.msgpack.encode(offer), msgspec.msgpack.Decoder(Offer)
    tracemalloc.start()
    try:
        decoded = decoder.decode(raw)
        # Only what this file's own calls allocated: other threads of the test process allocate at the same time.
        here = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, __file__)])
    finally:
        tracemalloc.stop()
    taken = sum(trace.size for trace in here.traces)
    assert decoded == offer
    assert taken <= offer.kept_bytes <= 2 * taken + 20_000


def test_an_early_arrival_expires_with_a_cause_and_leaves_nothing() -> None:
    side = source_side()
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.table.expire(10.0)
    (answer,) = side.said()
    assert isinstance(answer, Quiesced)
    assert answer.failure is not None
    assert answer.failure.detail == "the prefill side got no request for this room within 10 s"
    assert side.table.audit() == Audit()


def test_an_early_offer_goes_with_its_link() -> None:
    side = source_side()
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.table.peer_lost(DECODE, "reset", 0.0)
    assert side.table.audit() == Audit()
    assert side.source().phase is Phase.EXPECTED


def test_a_prefill_request_that_comes_after_its_offer_was_aborted_hears_why_at_once() -> None:
    side = source_side()
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.hear(
        DECODE,
        Abort(
            room=7,
            generation=69,
            failure=Failure(
                side=Side.SINK, phase="OFFERED", peer="p", detail="another generation", cause=Cause.ABORTED
            ),
        ),
    )
    side.hear(
        OTHER,
        Abort(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="not its offer", cause=Cause.ABORTED),
        ),
    )
    assert isinstance(side.table.early_messages()[0], Offer)
    failure = Failure(side=Side.SINK, phase="OFFERED", peer="p", detail="the client went away", cause=Cause.ABORTED)
    side.hear(DECODE, Abort(room=7, generation=70, failure=failure), now=1.0)
    assert side.table.early_messages() == (Decline(room=7, generation=70, failure=failure),)
    assert side.table.deadline() == 6.0
    room = side.source()
    assert (room.phase, room.failure) == (Phase.RELEASED, failure)
    assert side.table.audit().early_arrivals == 0


def test_a_new_offer_takes_the_place_of_an_old_decline() -> None:
    side = source_side()
    side.hear(DECODE, decline(7, generation=69))
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    assert side.table.audit().early_arrivals == 1
    assert side.source().phase is Phase.READY


def test_rooms_have_a_limit() -> None:
    side = HalfRoom(limits=Limits(rooms=1))
    side.source(1)
    with pytest.raises(LimitExceeded, match=r"1 rooms are open, and the limit is 1 \(Limits.rooms\)"):
        side.source(2)


def test_limits_and_timeouts_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="invalid drain_s = 0: give a number above 0"):
        Timeouts(drain_s=0)
    with pytest.raises(ConfigurationError, match="rooms = -1"):
        Limits(rooms=-1)


# -- rooms with the same number ---------------------------------------------------------------------------------------


def test_a_second_room_with_the_same_number_is_refused_and_the_first_is_untouched() -> None:
    side = sink_side()
    first = side.offered()
    with pytest.raises(RoomInUse, match="room 7 is already open on the decode side"):
        side.table.open(Sink(TIMES, identity=PROMPT), 7, 71, 0.0)
    assert first.phase is Phase.OFFERED
    side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=640, identity=PROMPT))
    assert first.status is KVPoll.Success


def test_a_number_can_be_used_again_while_its_last_use_still_drains() -> None:
    side = sink_side()
    first = side.offered(7, 70)
    side.table.feed(first, asked.Clear(), 0.0)
    second = side.offered(7, 71)
    side.hear(PREFILL, Quiesced(room=7, generation=70))
    assert first.gone
    assert second.phase is Phase.OFFERED
    assert len(side.table) == 1


def test_a_second_decode_worker_in_the_same_room_is_told_so() -> None:
    side = source_side()
    room = side.sending()
    side.hear(OTHER, Offer(room=7, generation=99, start=0, stop=20, pages=(5, 6), identity=PROMPT))
    (answer,) = side.said()
    assert isinstance(answer, Quiesced)
    assert answer.failure is not None
    assert "RoomInUse" in answer.failure.detail
    assert room.phase is Phase.SENDING


# -- law 11: a failure names its cause, equal on both sides -----------------------------------------------------------


@pytest.mark.parametrize("who", ["sink", "source"])
def test_both_sides_tell_the_same_sentence(who: str) -> None:
    decode, prefill = sink_side(), source_side()
    sink, source = decode.offered(), prefill.sending()
    first, second = (decode, prefill) if who == "sink" else (prefill, decode)
    room: Room = sink if who == "sink" else source
    first.table.feed(room, asked.GiveUp(detail="the client went away"), 0.0)
    for message in first.said():
        second.hear(DECODE if who == "sink" else PREFILL, message)
    assert sink.failure is not None
    assert source.failure == sink.failure
    peer, phase = ("prefill:1", "OFFERED") if who == "sink" else ("decode:1", "SENDING")
    assert sink.failure.sentence(7) == (
        f"room 7 failed on the {room.side.value} side in phase {phase} (peer {peer}): the client went away"
    )


def test_a_transfer_that_the_sink_refused_waits_for_the_sink_to_say_why() -> None:
    side = source_side()
    room = side.sending()
    side.table.feed(room, asked.Broke(transfer=0, detail="no such grant", revoked=True), 0.0)
    side.table.feed(room, asked.SendPages(pages=(2,), stop=20, last=True), 0.0)
    assert room.status is KVPoll.Transferring
    side.hear(
        DECODE,
        Abort(
            room=7,
            generation=70,
            failure=Failure(
                side=Side.SINK, phase="RECEIVING", peer="p", detail="the client went away", cause=Cause.ABORTED
            ),
        ),
    )
    assert room.failure is not None
    assert room.failure.detail == "the client went away"
    assert room.phase is Phase.RELEASED


def test_a_sink_that_does_not_say_why_it_refused_ends_the_room_all_the_same() -> None:
    side = source_side()
    room = side.sending()
    side.table.feed(room, asked.Broke(transfer=0, detail="no such grant", revoked=True), 0.0)
    side.table.expire(5.0)
    assert room.failure is not None
    awaited = "decode:1 to send the reason why it revoked its grant"
    assert room.failure.detail == f"timed out after 5 s (drain_s) waiting for {awaited}"


@pytest.mark.parametrize("early", [False, True], ids=["in time", "early"])
def test_a_sink_that_ends_before_it_offers_tells_the_source_why(early: bool) -> None:
    decode, prefill = sink_side(), source_side()
    sink = decode.sink()
    decode.effects()
    decode.table.feed(sink, asked.GiveUp(detail="no pages became free"), 0.0)
    (message,) = decode.said()
    assert isinstance(message, Decline)
    if early:
        prefill.hear(DECODE, message)
    source = prefill.source()
    if not early:
        prefill.hear(DECODE, message)
    assert source.failure == sink.failure
    assert source.told == {DECODE}
    prefill.table.feed(source, asked.Clear(), 0.0)
    assert prefill.table.audit() == Audit()


def test_a_sink_that_ends_before_its_links_are_up_tells_the_source_when_they_are() -> None:
    side = sink_side()
    room = Sink(TIMES, identity=PROMPT)
    side.table.open(room, 7, 70, 0.0)
    side.table.feed(room, asked.GiveUp(detail="too long for this pool"), 0.0)
    side.table.feed(room, asked.Clear(), 0.0)
    assert side.said() == []
    side.table.feed(room, asked.Resolved(sources=(PREFILL,)), 0.0)
    assert [type(message) for message in side.said()] == [Decline]
    assert side.table.audit() == Audit()


def test_a_decline_after_the_prefill_has_failed_is_taken_and_changes_nothing_else() -> None:
    side = source_side()
    room = side.source()
    side.table.feed(room, asked.GiveUp(detail="the prompt is too long"), 0.0)
    side.hear(
        DECODE,
        Decline(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OPENED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
    )
    assert room.failure is not None
    assert room.failure.detail == "the prompt is too long"
    assert room.told == {DECODE}
    assert side.table.audit().early_arrivals == 0


def test_an_early_decline_that_no_prefill_asks_for_expires_in_silence() -> None:
    side = source_side()
    side.hear(
        DECODE,
        Decline(
            room=7,
            generation=70,
            failure=Failure(side=Side.SINK, phase="OPENED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
    )
    side.table.expire(10.0)
    assert side.said() == []
    assert side.table.audit() == Audit()


def test_a_decline_does_not_touch_a_room_that_has_its_offer() -> None:
    side = source_side()
    room = side.sending()
    side.hear(
        OTHER,
        Decline(
            room=7,
            generation=99,
            failure=Failure(side=Side.SINK, phase="OPENED", peer="p", detail="gone", cause=Cause.ABORTED),
        ),
    )
    assert room.phase is Phase.SENDING


def test_an_offer_after_the_prefill_has_failed_gets_its_cause() -> None:
    side = source_side()
    room = side.source()
    side.table.feed(room, asked.GiveUp(detail="the prompt is too long"), 0.0)
    side.effects()
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    (answer,) = side.said()
    assert isinstance(answer, Quiesced)
    assert answer.failure is not None
    assert answer.failure.detail == "the prompt is too long"
    assert room.told == {DECODE}


# -- costs ------------------------------------------------------------------------------------------------------------


def test_the_deadline_is_the_earliest_of_all() -> None:
    side = source_side()
    assert side.table.deadline() is None
    early, late = side.source(1), Source(TIMES, identity=PROMPT)
    side.table.open(late, 2, None, 3.0)
    assert side.table.deadline() == 10.0
    side.table.expire(10.0)
    assert (early.status, late.status) == (KVPoll.Failed, KVPoll.Bootstrapping)
    assert side.table.deadline() == 13.0


def test_a_sink_that_asked_for_checksums_succeeds_only_when_they_agree() -> None:
    side = sink_side()
    room = side.offered(sources=(PREFILL, OTHER), checksum=True)
    side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT, checksum=11))
    assert side.said() == []
    side.hear(OTHER, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT, checksum=12))
    assert room.status is KVPoll.Transferring
    verify = next(effect for effect in side.effects() if isinstance(effect, do.Verify))
    assert verify.claims == (do.Claim(peer=PREFILL, checksum=11), do.Claim(peer=OTHER, checksum=12))
    assert not room.involved()  # the sources no longer write: losing them changes nothing
    side.table.peer_lost(PREFILL, "died", 1.0)
    side.table.feed(room, asked.Verified(error=None), 1.0)
    assert room.phase is Phase.LANDED
    effects = side.effects()
    assert [e for e in effects if isinstance(e, do.Send)] == [
        do.Send(peer=p, message=ChecksumsAgree(room=7, generation=70)) for p in (OTHER, PREFILL)
    ]
    assert do.ReleasePages((3, 4)) in effects


def test_a_checksum_that_differs_is_told_to_every_source_that_waits_for_it() -> None:
    side = sink_side()
    room = side.offered(sources=(PREFILL, OTHER), checksum=True)
    for source in (PREFILL, OTHER):
        side.hear(source, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT, checksum=11))
    side.effects()
    side.table.feed(room, asked.Verified(error="checksum mismatch"), 1.0)
    assert (room.phase, room.status) == (Phase.RELEASED, KVPoll.Failed)
    effects = side.effects()
    told = {e.peer: e.message for e in effects if isinstance(e, do.Send)}
    assert room.failure is not None
    assert told == dict.fromkeys((PREFILL, OTHER), Abort(room=7, generation=70, failure=room.failure))
    assert do.ReleasePages((3, 4)) in effects


def test_a_sink_that_fails_while_one_source_waits_for_the_verdict_tells_it() -> None:
    side = sink_side()
    room = side.offered(sources=(PREFILL, OTHER), checksum=True)
    side.hear(PREFILL, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT, checksum=11))
    side.effects()
    side.table.feed(room, asked.GiveUp(detail="enough"), 1.0)
    told = {effect.peer for effect in side.effects() if isinstance(effect, do.Send)}
    assert told == {PREFILL, OTHER}
    assert room.phase is Phase.DRAINING  # the other one may still write


def test_an_answer_of_a_checksum_that_comes_too_late_changes_nothing() -> None:
    for make, answer in ((sink_in, asked.Verified(error="too late")), (source_in, asked.Checksummed(value=5))):
        side, room = make(Phase.VERIFYING)
        side.table.feed(room, asked.GiveUp(detail="enough"), 0.0)
        side.effects()
        before = (room.phase, room.failure, room.timer)
        side.table.feed(room, answer, 1.0)
        assert (room.phase, room.failure, room.timer) == before
        assert side.effects() == []


def test_a_source_ends_with_the_verdict_of_the_peer_that_offered() -> None:
    side, room = source_in(Phase.VERIFYING)
    checksum = next(effect for effect in side.effects() if isinstance(effect, do.Checksum))
    assert [chunk.pages for chunk in checksum.chunks] == [(1,), (2,)]
    side.hear(DECODE, ChecksumsAgree(room=7, generation=70))  # before it can have compared a checksum
    assert room.phase.name == "VERIFYING"
    side.table.feed(room, asked.Checksummed(value=99), 1.0)
    done = side.said()
    assert [type(message) for message in done] == [Done]
    assert isinstance(done[0], Done)
    assert done[0].checksum == 99
    side.hear(OTHER, ChecksumsAgree(room=7, generation=70))
    side.hear(DECODE, ChecksumsAgree(room=7, generation=71))
    assert room.phase.name == "VERIFYING"
    side.hear(DECODE, ChecksumsAgree(room=7, generation=70))
    assert room.phase is Phase.SENT
    assert do.ReleasePages((1, 2)) in side.effects()


def test_a_source_whose_checksum_was_not_judged_ends_in_time() -> None:
    side, room = source_in(Phase.VERIFYING)
    assert room.awaited == "its own checksum"
    side.table.feed(room, asked.Checksummed(value=99), 1.0)
    assert room.awaited == "decode:1 to compare the checksum"
    side.table.expire(31.0)
    assert room.failure is not None
    assert room.failure.detail == "timed out after 30 s (stall_s) waiting for decode:1 to compare the checksum"
    assert room.phase is Phase.RELEASED


def test_a_room_says_what_it_waits_for_and_keeps_the_times_of_its_phases() -> None:
    side = sink_side()
    room = Sink(TIMES, identity=PROMPT)
    side.table.open(room, 7, 70, 1.0)
    waits = [room.awaited]
    for what, now in (
        (asked.Resolved(sources=(PREFILL,)), 2.0),
        (asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640, grant=GRANT), 3.0),
        (Progress(room=7, generation=70, tokens=8), 4.0),
        (Progress(room=7, generation=70, tokens=16), 5.0),
        (asked.GiveUp(detail="enough"), 6.0),
        (Quiesced(room=7, generation=70), 7.0),
    ):
        if isinstance(what, Progress | Quiesced):
            side.hear(PREFILL, what, now)
        else:
            side.table.feed(room, what, now)
        waits.append(room.awaited)
    assert waits == [
        "links to its sources",
        "the engine to offer pages",
        "the first bytes from prefill:1",
        "more bytes from prefill:1",
        "more bytes from prefill:1",
        "proof that prefill:1 can no longer write: its message, the end of its process, or `kvroom fence`",
        None,
    ]
    assert [(step.phase, step.at) for step in room.history] == [
        (Phase.OPENED, 1.0),
        (Phase.OFFERED, 3.0),
        (Phase.RECEIVING, 4.0),
        (Phase.DRAINING, 6.0),
        (Phase.RELEASED, 7.0),
    ]


def decline(number: int, generation: int = 70) -> Decline:
    return Decline(
        room=number,
        generation=generation,
        failure=Failure(side=Side.SINK, phase="OPENED", peer="p", detail="gone", cause=Cause.ABORTED),
    )


def test_early_declines_never_cost_an_offer_its_place() -> None:
    side = HalfRoom(DECODE, OTHER, limits=Limits(early_arrivals=2, early_arrivals_per_peer=2))
    for number in (1, 2, 3):
        side.hear(DECODE, decline(number))
    for number in (11, 12):
        side.hear(DECODE, Offer(room=number, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    assert side.said() == []
    assert side.table.audit().early_arrivals == 4  # the oldest decline made room for the newest
    rooms = [side.source(number) for number in (1, 2, 3, 11)]
    assert [room.phase for room in rooms] == [Phase.EXPECTED, Phase.RELEASED, Phase.RELEASED, Phase.READY]


def test_an_early_decline_lives_only_as_long_as_the_two_requests_may_come_apart() -> None:
    side = source_side()
    side.hear(DECODE, decline(7), now=1.0)
    side.hear(DECODE, decline(7, generation=71), now=2.0)  # once for a number
    assert (side.table.audit().early_arrivals, side.table.deadline()) == (1, 7.0)
    side.table.expire(7.0)
    assert side.table.audit() == Audit()
    assert side.source().phase is Phase.EXPECTED


def test_a_room_that_takes_an_early_offer_is_not_ended_by_an_early_decline_beside_it() -> None:
    side = source_side()
    side.hear(DECODE, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.hear(OTHER, decline(7, generation=99))
    assert side.source().phase is Phase.READY
    assert side.table.audit().early_arrivals == 0


def test_a_lost_peer_takes_its_early_offers_and_declines_along() -> None:
    side = source_side()
    side.hear(DECODE, decline(1))
    side.hear(DECODE, Offer(room=2, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.hear(OTHER, Offer(room=3, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT))
    side.table.peer_lost(DECODE, "died", 1.0)
    assert [message.room for message in side.table.early_messages()] == [3]
    side.table.peer_lost(OTHER, "died", 1.0)
    assert side.table.audit() == Audit()
    assert side.table.deadline() is None

"""One source with several sinks, and sinks whose sources split the tokens: the state machines alone."""

from __future__ import annotations

import pytest

from identities import PROMPT
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.delivery import tiles
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import (
    Abort,
    ChecksumsAgree,
    Decline,
    Done,
    Failure,
    Message,
    Offer,
    PartNumbers,
    Peer,
    Progress,
    Quiesced,
    Window,
)
from kvroom.core.phases import KVPoll, Phase, Side
from kvroom.core.settings import Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable

TIMES = Timeouts(bootstrap_s=10, waiting_s=10, stall_s=10, drain_s=5, decline_s=1)
ONE, TWO, THREE = (Peer(f"rank-{n}", n) for n in (1, 2, 3))
WHY = Failure(side=Side.SINK, phase="OFFERED", peer="10.0.0.9:1", detail="enough", cause=Cause.ABORTED)


class Table:
    """A table with linked peers, and its effects."""

    def __init__(self) -> None:
        self.rooms = RoomTable(TIMES)
        self.seq = 0
        for peer in (ONE, TWO, THREE):
            self.rooms.peer_up(peer, 0.0)

    def hear(self, peer: Peer, *messages: Message, now: float = 0.0) -> None:
        for message in messages:
            self.seq += 1
            self.rooms.receive(peer, self.seq, message, now)

    def effects(self) -> list[do.Effect]:
        return [effect for _, effect in self.rooms.take_effects()]

    def submits(self) -> list[do.Submit]:
        return [effect for effect in self.effects() if isinstance(effect, do.Submit)]

    def said(self) -> list[tuple[Peer, type[Message]]]:
        return [(effect.peer, type(effect.message)) for effect in self.effects() if isinstance(effect, do.Send)]


def offer(
    generation: int,
    *,
    sinks: int = 2,
    checksum: bool = False,
    tokens: int = 20,
    parts: tuple[PartNumbers, ...] | None = None,
) -> Offer:
    return Offer(
        room=7,
        generation=generation,
        start=0,
        stop=tokens,
        pages=(3, 4),
        identity=PROMPT,
        grant=b"",
        checksum=checksum,
        tokens=None,
        windows=(),
        sinks=sinks,
        parts=parts,
    )


def source(*, sent: bool = True) -> tuple[Table, Source]:
    """A source of two chunks, [0, 16) and [16, 20)."""
    table, room = Table(), Source(TIMES, identity=PROMPT)
    table.rooms.open(room, 7, None, 0.0)
    for stop in (16, 20) if sent else ():
        table.rooms.feed(room, asked.SendPages(pages=(stop // 16,), stop=stop, last=stop == 20), 0.0)
    table.effects()
    return table, room


def test_each_sink_is_served_when_it_comes_and_the_room_is_over_when_all_have_everything() -> None:
    table, room = source()
    assert (room.status, room.decode_prefix_len) == (KVPoll.Bootstrapping, None)
    table.hear(ONE, offer(70))
    first = table.submits()
    assert [(one.peer, one.start, one.stop) for one in first] == [(ONE, 0, 16), (ONE, 16, 20)]
    for submit in first:
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=100), 0.0)
    assert table.said() == [(ONE, Progress), (ONE, Done)]
    assert (room.phase, room.awaited) == (Phase.SENDING, "all decode ranks to offer pages: 1 of 2 have")
    table.hear(TWO, offer(71))
    second = table.submits()
    assert len({one.transfer for one in (*first, *second)}) == 4
    for submit in second:
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=100), 0.0)
    assert (room.phase, room.nbytes, room.decode_prefix_len) == (Phase.SENT, 400, 0)
    table.rooms.feed(room, asked.Clear(), 0.0)
    assert table.rooms.audit().empty


def test_offers_that_come_before_the_prefill_are_kept_for_each_sink_and_a_third_is_refused() -> None:
    table = Table()
    table.hear(ONE, offer(70))
    table.hear(TWO, offer(71))
    table.hear(THREE, offer(72))
    assert table.said() == [(THREE, Quiesced)]
    table.hear(ONE, offer(73))
    assert table.said() == [(ONE, Quiesced)]
    assert table.rooms.audit().early_arrivals == 2
    room = Source(TIMES, identity=PROMPT)
    table.rooms.open(room, 7, None, 0.0)
    assert room.complete
    assert (room.status, table.rooms.audit().early_arrivals) == (KVPoll.WaitingForInput, 0)


@pytest.mark.parametrize("other", [offer(71, sinks=3), offer(71, tokens=21), offer(71, sinks=1)])
def test_a_sink_of_another_worker_is_not_taken_for_a_sibling(other: Offer) -> None:
    table, room = source(sent=False)
    table.hear(ONE, offer(70))
    table.hear(TWO, other)
    assert table.said() == [(TWO, Quiesced)]
    assert [delivery.peer for delivery in room.deliveries] == [ONE]
    early = Table()
    early.hear(ONE, offer(70))
    early.hear(TWO, other)
    assert early.said() == [(TWO, Quiesced)]


def test_what_fails_for_one_sink_ends_the_other_and_no_page_goes_before_both_are_quiet() -> None:
    table, room = source()
    table.hear(ONE, offer(70))
    table.hear(TWO, offer(71))
    submits = table.submits()
    table.hear(ONE, Abort(room=7, generation=70, failure=WHY))
    assert (room.phase, room.failure) == (Phase.DRAINING, WHY)
    assert table.said() == [(ONE, Abort), (TWO, Abort)]
    for submit in submits:
        assert room.phase is Phase.DRAINING
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 0.0)
    effects = table.effects()
    told = [(effect.peer, effect.message) for effect in effects if isinstance(effect, do.Send)]
    assert told == [
        (ONE, Quiesced(room=7, generation=70, failure=WHY)),
        (TWO, Quiesced(room=7, generation=71, failure=WHY)),
    ]
    assert [type(effect) for effect in effects if isinstance(effect, do.ReleasePages)] == [do.ReleasePages]
    assert room.phase is Phase.RELEASED


def test_a_sink_that_has_everything_gets_an_answer_when_it_gives_up_all_the_same() -> None:
    """Its `Done` may have been lost with a link; the room still serves the other sink, so it is not over."""
    table, room = source()
    table.hear(ONE, offer(70))
    for submit in table.submits():
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 0.0)
    table.hear(TWO, offer(71))
    table.effects()
    table.hear(ONE, Abort(room=7, generation=70, failure=WHY))
    assert (ONE, Quiesced) in table.said()
    assert room.phase is Phase.DRAINING


def test_a_sink_that_never_offers_ends_the_room_by_its_deadline_and_hears_why_when_it_comes() -> None:
    table, room = source()
    table.hear(ONE, offer(70))
    for submit in table.submits():
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 9.0)
    assert table.rooms.deadline() == 10.0
    table.rooms.expire(10.0)
    assert room.failure is not None
    assert room.failure.cause is Cause.BOOTSTRAP
    assert "1 of 2 have" in room.failure.detail
    assert not room.answered
    table.effects()
    table.hear(TWO, offer(71), now=10.0)
    (said,) = [effect.message for effect in table.effects() if isinstance(effect, do.Send)]
    assert said == Quiesced(room=7, generation=71, failure=room.failure)
    assert room.answered


def test_a_sink_that_declines_ends_the_room_for_its_sibling() -> None:
    table, room = source()
    table.hear(ONE, offer(70))
    table.effects()
    table.hear(TWO, Decline(room=7, generation=71, failure=WHY))
    assert (room.phase, room.failure) == (Phase.DRAINING, WHY)
    assert room.answered


def test_a_sibling_that_is_lost_ends_the_room_only_while_it_needs_something() -> None:
    table, room = source()
    table.hear(ONE, offer(70))
    for submit in table.submits():
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 0.0)
    table.hear(TWO, offer(71))
    table.rooms.peer_lost(ONE, "it died", 0.0)
    assert room.phase is Phase.SENDING
    table.rooms.peer_lost(TWO, "it died", 0.0)
    assert room.phase.name == "DRAINING"


def test_checksums_are_told_and_agreed_with_each_sink_by_itself() -> None:
    table, room = source()
    for peer, generation in ((ONE, 70), (TWO, 71)):
        table.hear(peer, offer(generation, checksum=True))
        for submit in table.submits():
            table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 0.0)
    assert room.phase is Phase.VERIFYING
    table.rooms.feed(room, asked.Checksummed(value=11, peer=ONE), 0.0)
    table.rooms.feed(room, asked.Checksummed(value=12, peer=TWO), 0.0)
    done = [(effect.peer, effect.message) for effect in table.effects() if isinstance(effect, do.Send)]
    assert [(peer, said.checksum) for peer, said in done if isinstance(said, Done)] == [(ONE, 11), (TWO, 12)]
    table.hear(ONE, ChecksumsAgree(room=7, generation=70))
    assert room.phase is Phase.VERIFYING
    table.hear(TWO, ChecksumsAgree(room=7, generation=71))
    assert room.phase.name == "SENT"


def test_a_rank_that_only_reports_submits_nothing() -> None:
    table, room = source()
    table.hear(ONE, offer(70, sinks=1, parts=()))
    assert table.said() == [(ONE, Done)]
    assert (room.phase, room.nbytes) == (Phase.SENT, 0)


def test_windows_of_further_groups_come_with_the_last_chunk_and_a_full_hit_moves_only_them() -> None:
    table, room = source(sent=False)
    given, wanted = (Window("state", (5,)),), (Window("state", (9,)),)
    table.hear(ONE, Offer(room=7, generation=70, start=20, stop=20, pages=(), identity=PROMPT, windows=wanted))
    table.rooms.feed(room, asked.SendPages(pages=(1,), stop=16), 0.0)
    assert table.submits() == []
    table.rooms.feed(room, asked.SendPages(pages=(2,), stop=20, last=True, windows=given), 0.0)
    (submit,) = table.submits()
    assert (submit.start, submit.stop, submit.windows) == (20, 20, given)
    table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=64), 0.0)
    assert room.phase is Phase.SENT


# -- sinks whose sources split the tokens -----------------------------------------------------------------------------


def sink(shares: tuple[asked.Share, ...]) -> tuple[Table, Sink]:
    """A sink of tokens [0, 20) and 200 bytes, of two sources."""
    table, room = Table(), Sink(TIMES, identity=PROMPT)
    table.rooms.open(room, 7, 70, 0.0)
    table.rooms.feed(room, asked.Resolved(sources=(ONE, TWO), shares=shares), 0.0)
    table.rooms.feed(room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=200), 0.0)
    return table, room


TEAM = (asked.Share(team=0), asked.Share(team=0))


def test_every_source_is_told_its_own_part() -> None:
    table, _ = sink((asked.Share(sinks=3), asked.Share(sinks=2, parts=())))
    offers = [effect.message for effect in table.effects() if isinstance(effect, do.Send)]
    assert [(one.sinks, one.parts) for one in offers if isinstance(one, Offer)] == [(3, None), (2, ())]


def test_a_team_that_fills_the_window_together_completes_the_room() -> None:
    table, room = sink(TEAM)
    table.hear(ONE, Done(room=7, generation=70, tokens=20, nbytes=100, identity=PROMPT, spans=((0, 5), (15, 20))))
    table.hear(TWO, Done(room=7, generation=70, tokens=20, nbytes=100, identity=PROMPT, spans=((5, 15),)))
    assert room.phase is Phase.LANDED


@pytest.mark.parametrize(
    ("shares", "spans"),
    [
        (TEAM, ((0, 5), (10, 20))),  # a gap
        (TEAM, ((0, 12), (10, 20))),  # some tokens twice
        (TEAM, ((0, 10), (0, 10))),  # one half twice: as many bytes as are needed
        ((asked.Share(team=0), asked.Share(team=1)), ((0, 10), (10, 20))),  # each source alone had to fill it
        ((), ((0, 10), (10, 20))),
    ],
)
def test_tokens_that_are_missing_or_came_twice_are_no_success(
    shares: tuple[asked.Share, ...], spans: tuple[tuple[int, int], ...]
) -> None:
    table, room = sink(shares)
    for peer, span in zip((ONE, TWO), spans, strict=True):
        table.hear(peer, Done(room=7, generation=70, tokens=20, nbytes=100, identity=PROMPT, spans=(span,)))
    assert room.failure is not None
    assert room.failure.cause is Cause.LENGTH
    assert "[0, 20)" in room.failure.detail
    assert room.failure.peer == f"{ONE}, {TWO}"


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(Done(room=7, generation=70, tokens=19, nbytes=100, identity=PROMPT), id="tokens"),
        pytest.param(Done(room=7, generation=70, tokens=20, nbytes=100, identity=KVIdentity.of([1])), id="identity"),
        pytest.param(Quiesced(room=7, generation=70), id="stopped"),
    ],
)
def test_a_failure_names_the_source_whose_report_was_wrong(report: Done | Quiesced) -> None:
    """The failure names that source, which is no longer involved, and not its sibling, which still writes."""
    table, room = sink(TEAM)
    table.hear(TWO, report)
    assert room.failure is not None
    assert room.failure.peer == str(TWO)


def test_spans_tile_a_window() -> None:
    assert tiles([(5, 9), (0, 5)], 0, 9)
    assert tiles([(3, 3)], 7, 7)
    assert not tiles([(0, 5), (6, 9)], 0, 9)
    assert not tiles([(0, 5), (4, 9)], 0, 9)
    assert not tiles([], 0, 9)


def test_a_source_reports_the_stretches_that_it_had() -> None:
    table, room = source(sent=False)
    table.hear(ONE, offer(70, sinks=1))
    for start, stop in ((2, 4), (4, 6), (10, 12), (20, 20)):
        table.rooms.feed(room, asked.SendPages(pages=(), stop=stop, last=stop == 20, start=start), 0.0)
    for submit in table.submits():
        table.rooms.feed(room, asked.Landed(transfer=submit.transfer, nbytes=1), 0.0)
    (done,) = [e.message for e in table.effects() if isinstance(e, do.Send) and isinstance(e.message, Done)]
    assert (done.tokens, done.spans) == (20, ((2, 6), (10, 12)))


def windowed() -> tuple[Table, Sink]:
    """Return a sink of two sources that split the tokens, with one state as a further group."""
    table, room = Table(), Sink(TIMES, identity=PROMPT)
    table.rooms.open(room, 7, 70, 0.0)
    table.rooms.feed(room, asked.Resolved(sources=(ONE, TWO), shares=TEAM), 0.0)
    table.rooms.feed(
        room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=232, windows=(Window("state", (5,)),)), 0.0
    )
    return table, room


def test_one_rank_of_a_team_brings_a_group() -> None:
    table, room = windowed()
    table.hear(ONE, Done(room=7, generation=70, tokens=20, nbytes=100, identity=PROMPT, spans=((0, 10),), windows=()))
    table.hear(TWO, Done(room=7, generation=70, tokens=20, nbytes=132, identity=PROMPT, spans=((10, 20),)))
    assert room.phase is Phase.LANDED


def test_a_group_that_two_ranks_of_a_team_bring_is_no_success() -> None:
    table, room = windowed()
    table.hear(ONE, Done(room=7, generation=70, tokens=20, nbytes=100, identity=PROMPT, spans=((0, 10),)))
    table.hear(TWO, Done(room=7, generation=70, tokens=20, nbytes=132, identity=PROMPT, spans=((10, 20),)))
    assert room.failure is not None
    assert "'state' twice" in room.failure.detail
    assert room.failure.peer == f"{ONE}, {TWO}"

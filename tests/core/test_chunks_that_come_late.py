"""A sink waits `waiting_s` for a chunk that is not computed yet, and `stall_s` for bytes in flight."""

from __future__ import annotations

import pytest

from identities import PROMPT
from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.messages import Done, Message, Offer, Peer, Progress
from kvroom.core.phases import Phase
from kvroom.core.room import Timer
from kvroom.core.settings import Timeouts, Wait
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable

TIMES = Timeouts(bootstrap_s=10, waiting_s=300, stall_s=60, drain_s=5)
ONE, TWO = Peer("prefill:1", 1), Peer("prefill:2", 2)


def receiving(*sources: Peer) -> tuple[RoomTable, Sink]:
    """Return a sink that waits for bytes of these sources, 640 in all."""
    table, room = RoomTable(TIMES), Sink(TIMES, identity=PROMPT)
    for peer in sources:
        table.peer_up(peer, 0.0)
    table.open(room, 7, 70, 0.0)
    table.feed(room, asked.Resolved(sources=sources), 0.0)
    table.feed(room, asked.OfferPages(pages=(3, 4), start=0, stop=20, nbytes=640), 0.0)
    return table, room


def hear(table: RoomTable, now: float, *said: tuple[Peer, Message]) -> None:
    for seq, (peer, message) in enumerate(said, int(now) + 1):
        table.receive(peer, seq, message, now)


def test_the_source_says_with_each_chunk_whether_another_is_under_way() -> None:
    table, room = RoomTable(TIMES), Source(TIMES, identity=PROMPT)
    table.peer_up(ONE, 0.0)
    table.open(room, 7, None, 0.0)
    table.receive(ONE, 1, Offer(room=7, generation=70, start=0, stop=20, pages=(3, 4), identity=PROMPT), 0.0)
    table.feed(room, asked.SendPages(pages=(1,), stop=8), 0.0)
    table.feed(room, asked.SendPages(pages=(1,), stop=16), 0.0)
    table.take_effects()
    said = []
    for transfer in (0, 1):
        table.feed(room, asked.Landed(transfer=transfer, nbytes=256), 1.0)
        said += [effect.message for _, effect in table.take_effects() if isinstance(effect, do.Send)]
    assert said == [
        Progress(room=7, generation=70, tokens=8, idle=False),
        Progress(room=7, generation=70, tokens=16, idle=True),
    ]


@pytest.mark.parametrize(
    ("idle", "waited", "kind"),
    [(True, "timed out after 300 s (waiting_s) waiting for further pages from prefill:1", Cause.WAITING),
     (False, "timed out after 60 s (stall_s) waiting for more bytes from prefill:1", Cause.STALL)],
)  # fmt: skip
def test_a_sink_waits_by_what_the_source_says(idle: bool, waited: str, kind: Cause) -> None:
    table, room = receiving(ONE)
    hear(table, 1.0, (ONE, Progress(room=7, generation=70, tokens=8, idle=idle)))
    assert room.timer is not None
    end = room.timer.at
    table.expire(end - 0.1)
    assert room.phase is Phase.RECEIVING
    table.expire(end)
    assert room.failure is not None
    assert (room.failure.detail, room.failure.cause) == (waited, kind)


def test_with_several_sources_the_slowest_engine_counts() -> None:
    table, room = receiving(ONE, TWO)
    hear(
        table,
        1.0,
        (ONE, Progress(room=7, generation=70, tokens=8, idle=True)),
        (TWO, Progress(room=7, generation=70, tokens=8)),
    )
    assert room.timer == Timer(Wait.WAITING, 301.0)
    hear(table, 10.0, (ONE, Progress(room=7, generation=70, tokens=16)))
    assert room.timer == Timer(Wait.STALL, 70.0)
    hear(table, 20.0, (TWO, Progress(room=7, generation=70, tokens=16, idle=True)))
    assert room.timer == Timer(Wait.WAITING, 320.0)
    hear(table, 30.0, (TWO, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT)))
    assert room.timer == Timer(Wait.STALL, 90.0)
    hear(table, 40.0, (ONE, Done(room=7, generation=70, tokens=20, nbytes=320, identity=PROMPT)))
    assert room.phase is Phase.LANDED

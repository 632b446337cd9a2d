"""Conformance: ends that end. Peers that die, restart or close, one's own close, and a thousand times of everything."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks

from .ends import Footprint
from .stage import (
    SMALL,
    SOON_S,
    CheckStage,
    Pair,
    apply,
    connect,
    expect,
    fails,
    flood,
    lands,
    parts,
    same,
    scattered,
    settle,
    undisturbed,
    until,
)

GROWTH = Footprint(threads=4, descriptors=8, resident_bytes=6 << 20)
"""What may be there more after 900 rounds than after the first 100. A thread or a descriptor left over in every round
would be hundreds, so a few that come late do not matter. Memory: less than 7 KiB for each round, which is what
allocators and the interpreter keep by themselves; a stack, a socket's buffer or a registration is more."""


def a_killed_peer_fails_transfers_and_is_fenced(stage: CheckStage) -> None:
    """SIGKILL of the sink in the middle: every transfer is done soon, later ones fail, and `fence` becomes proof."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 8_000, 1_200), pair.grant()
    tickets = flood(pair, blocks, grant)
    pair.source.outcome(tickets.pop(0))
    stage.kill(pair.sink)
    tickets += flood(pair, blocks, grant, 1)
    expect(not settle(pair.source, tickets)[-1], "a transfer to a dead process succeeded")
    until(lambda: pair.source.fence(pair.to_sink), "a dead peer is fenced with proof")
    fails(pair, blocks, grant)


def a_killed_writer_is_fenced_and_writes_no_more(stage: CheckStage) -> None:
    """SIGKILL of the source in the middle: the sink's `fence` becomes proof, and another source is served."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 8_000, 1_200)
    tickets = flood(pair, blocks, pair.grant())
    pair.source.outcome(tickets[0])
    stage.kill(pair.source)
    until(lambda: pair.sink.fence(pair.to_source), "a dead writer is fenced with proof")
    undisturbed(pair.sink)
    again = connect(stage.open(), pair.sink)
    expect(again.to_source != pair.to_source, "a handle that was forgotten is not used again")
    lands(again, scattered(again.source, pair.sink, 500, 600))


def meets_a_restarted_peer(stage: CheckStage) -> None:
    """After the sink's process was killed and started again, its new description connects and blocks land."""
    pair = stage.pair(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 500, 600), pair.grant()
    lands(pair, blocks, grant)
    tickets = flood(pair, blocks, grant, 10)
    stage.kill(pair.sink)
    again = connect(pair.source, stage.open(SMALL))
    expect(again.to_sink != pair.to_sink, "a process that started again is another peer")
    there = scattered(pair.source, again.sink, 500, 600)
    lands(again, there)
    settle(pair.source, tickets)
    fails(pair, blocks, grant)
    until(lambda: pair.source.fence(pair.to_sink), "the dead peer is fenced with proof")
    lands(again, there)


def serves_the_living_while_a_peer_is_dead(stage: CheckStage) -> None:
    """Transfers to a dead peer fail when they fail; another peer is served at once, before, meanwhile and after."""
    pair, other = stage.pair(), stage.open(SMALL)
    alive = connect(pair.source, other)
    there = scattered(pair.source, other, 500, 600)
    lands(alive, there)
    blocks, grant = scattered(pair.source, pair.sink, 8_000, 1_200), pair.grant()
    tickets = flood(pair, blocks, grant, 20)
    stage.kill(pair.sink)
    tickets += flood(pair, blocks, grant, 20)
    _lands_soon(alive, there)
    expect(not any(settle(pair.source, tickets)[20:]), "a transfer to a dead process succeeded")
    _lands_soon(alive, there)
    until(lambda: pair.source.fence(pair.to_sink), "the dead peer is fenced with proof")
    _lands_soon(alive, there)


def _lands_soon(pair: Pair, blocks: Blocks) -> None:
    start_s = time.monotonic()
    lands(pair, blocks)
    took_s = time.monotonic() - start_s
    expect(took_s < SOON_S, f"a transfer to a living peer took {took_s:.1f} s because another peer is dead")


def a_closed_peer_is_met_again(stage: CheckStage) -> None:
    """The sink closes its transport with transfers under way and opens another in the same process."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 5_000, 600)
    tickets = flood(pair, blocks, pair.grant())
    pair.sink.reopen()
    settle(pair.source, tickets)
    again = connect(pair.source, pair.sink)
    lands(again, blocks)
    pair.source.fence(pair.to_sink)
    lands(again, blocks)


def a_failed_batch_is_followed_by_good_ones(stage: CheckStage) -> None:
    """A batch that is refused among good ones that are under way harms neither those before it nor those after it."""
    pair = stage.pair(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 500, 600), pair.grant()
    bad = blocks._replace(dst=blocks.dst.copy())
    bad.dst[300] = pair.sink.addresses[-1] + SMALL[-1]
    for _ in range(5):
        tickets = [ticket for each in (blocks, bad, blocks) for ticket in flood(pair, each, grant, 5)]
        ends = settle(pair.source, tickets)
        expect(ends == [True] * 5 + [False] * 5 + [True] * 5, f"good, bad and good transfers ended so: {ends}")
        lands(pair, blocks, grant)


def close_ends_what_is_under_way(stage: CheckStage) -> None:
    """After `close` every future is done and nothing lands; a second one does no harm, and what is asked then fails."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    description = pair.sink.describe()
    flood(pair, blocks, grant)
    pair.source.close()
    expect(pair.source.unfinished() == 0, "after close every future is done")

    def go_on() -> None:
        pair.source.close()
        fails(pair, blocks, grant)

    undisturbed(pair.sink, go_on)
    try:
        again = pair.source.connect(description)
    except TransportError:
        return
    fails(pair._replace(to_sink=again), blocks, grant)


def connects_and_fences_without_growth(stage: CheckStage) -> None:
    """A thousand times connect, move, fence (`connects`): no threads, descriptors or memory are left at either end."""
    _without_growth(stage.pair(SMALL), stage.connects, None)


def opens_and_closes_without_growth(stage: CheckStage) -> None:
    """The same with whole transports, closed and opened at both ends, as often as the stage says (`reopens`)."""

    def reopen(pair: Pair) -> None:
        pair.source.reopen()
        pair.sink.reopen()

    _without_growth(stage.pair(SMALL), stage.reopens, reopen)


def _without_growth(pair: Pair, rounds: int, between: Callable[[Pair], None] | None) -> None:
    """Connect, move and fence in every round; what both processes hold is compared from the first tenth to the end."""
    blocks = scattered(pair.source, pair.sink, 3 * rounds, 100)
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    ends, before = (pair.source, pair.sink), [Footprint(0, 0, 0)] * 2
    for number, part in enumerate(parts(blocks, rounds)):
        if number == rounds // 10:
            before = [end.footprint() for end in ends]
        pair = connect(pair.source, pair.sink)
        expect(pair.source.move(pair.to_sink, part, pair.grant()) == part.nbytes, "a transfer says another size")
        pair.source.fence(pair.to_sink)
        pair.sink.fence(pair.to_source)
        if between is not None:
            between(pair)
    same(pair.sink.contents(), wanted)
    for name, end, first in zip(("source", "sink"), ends, before, strict=True):
        limit = tuple(a + b for a, b in zip(first, GROWTH, strict=True))
        # What ends by itself, such as the thread of a connection that the peer closed, is given time to.
        end_s, now = time.monotonic() + SOON_S, end.footprint()
        while any(a > b for a, b in zip(now, limit, strict=True)):
            expect(time.monotonic() < end_s, f"the {name}'s process grew from {first} to {now}, by more than {GROWTH}")
            now = end.footprint()


CHECKS: tuple[Callable[[CheckStage], None], ...] = (
    a_killed_peer_fails_transfers_and_is_fenced,
    a_killed_writer_is_fenced_and_writes_no_more,
    meets_a_restarted_peer,
    serves_the_living_while_a_peer_is_dead,
    a_closed_peer_is_met_again,
    a_failed_batch_is_followed_by_good_ones,
    close_ends_what_is_under_way,
    connects_and_fences_without_growth,
    opens_and_closes_without_growth,
)

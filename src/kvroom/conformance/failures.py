"""Checks of ends that fail or close: killed, restarted and closed peers, `close` of this side, and growth over time."""

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
"""The growth that is permitted from the first tenth of the rounds to the end. A thread or a descriptor that leaks in
every round would add hundreds, so a few late ones do not matter. Memory: less than 7 KiB per round (900 rounds), which
allocators and the interpreter keep by themselves; a stack, a socket's buffer or a registration is larger."""


def a_killed_peer_fails_transfers_and_is_fenced(stage: CheckStage) -> None:
    """After SIGKILL of the sink during transfers, all of them end soon, later ones fail, and `fence` returns True."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 8_000, 1_200), pair.grant()
    tickets = flood(pair, blocks, grant)
    pair.source.outcome(tickets.pop(0))
    stage.kill(pair.sink)
    tickets += flood(pair, blocks, grant, 1)
    expect(not settle(pair.source, tickets)[-1], "a transfer to a dead process succeeded")
    until(lambda: pair.source.fence(pair.to_sink), "`fence` of a dead peer returns True")
    fails(pair, blocks, grant)


def a_killed_writer_is_fenced_and_writes_no_more(stage: CheckStage) -> None:
    """After SIGKILL of the source during transfers, the sink's `fence` returns True, and another source is served."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 8_000, 1_200)
    tickets = flood(pair, blocks, pair.grant())
    pair.source.outcome(tickets[0])
    stage.kill(pair.source)
    until(lambda: pair.sink.fence(pair.to_source), "`fence` of a dead writer returns True")
    undisturbed(pair.sink)
    again = connect(stage.open(), pair.sink)
    expect(again.to_source != pair.to_source, "`connect` reused a handle that a proven fence had ended")
    lands(again, scattered(again.source, pair.sink, 500, 600))


def meets_a_restarted_peer(stage: CheckStage) -> None:
    """After the sink's process was killed and restarted, `connect` with its new description works and blocks land."""
    pair = stage.pair(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 500, 600), pair.grant()
    lands(pair, blocks, grant)
    tickets = flood(pair, blocks, grant, 10)
    stage.kill(pair.sink)
    again = connect(pair.source, stage.open(SMALL))
    expect(again.to_sink != pair.to_sink, "a restarted process got the old handle, although it is another peer")
    there = scattered(pair.source, again.sink, 500, 600)
    lands(again, there)
    settle(pair.source, tickets)
    fails(pair, blocks, grant)
    until(lambda: pair.source.fence(pair.to_sink), "`fence` of the dead peer returns True")
    lands(again, there)


def serves_the_living_while_a_peer_is_dead(stage: CheckStage) -> None:
    """Another peer is served without delay while transfers to a dead peer are failing, and afterwards."""
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
    until(lambda: pair.source.fence(pair.to_sink), "`fence` of the dead peer returns True")
    _lands_soon(alive, there)


def _lands_soon(pair: Pair, blocks: Blocks) -> None:
    start_s = time.monotonic()
    lands(pair, blocks)
    took_s = time.monotonic() - start_s
    expect(took_s < SOON_S, f"a transfer to a living peer took {took_s:.1f} s because another peer is dead")


def a_closed_peer_is_met_again(stage: CheckStage) -> None:
    """The sink closes its transport during transfers and opens another one: that one is a new peer, and blocks land."""
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
    """Transfers that are refused fail alone: those submitted before and after them land."""
    pair = stage.pair(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 500, 600), pair.grant()
    bad = blocks._replace(dst=blocks.dst.copy())
    bad.dst[300] = pair.sink.addresses[-1] + SMALL[-1]
    for _ in range(5):
        tickets = [ticket for each in (blocks, bad, blocks) for ticket in flood(pair, each, grant, 5)]
        ends = settle(pair.source, tickets)
        expect(
            ends == [True] * 5 + [False] * 5 + [True] * 5,
            f"of 5 good, 5 bad and 5 good transfers, these succeeded: {ends}",
        )
        lands(pair, blocks, grant)


def close_ends_what_is_under_way(stage: CheckStage) -> None:
    """After `close` every future is done and no byte lands. A second `close` does no harm; a later `submit` fails."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    description = pair.sink.describe()
    flood(pair, blocks, grant)
    pair.source.close()
    expect(pair.source.unfinished() == 0, "`close` returned, but a transfer is not done")

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
    """A thousand rounds of connect, move and fence (`connects`) leak no threads, descriptors or memory at any end."""
    _without_growth(stage.pair(SMALL), stage.connects, None)


def opens_and_closes_without_growth(stage: CheckStage) -> None:
    """Rounds in which both ends also close and reopen their transports (`reopens`) leak nothing at either end."""

    def reopen(pair: Pair) -> None:
        pair.source.reopen()
        pair.sink.reopen()

    _without_growth(stage.pair(SMALL), stage.reopens, reopen)


def _without_growth(pair: Pair, rounds: int, between: Callable[[Pair], None] | None) -> None:
    """Connect, move and fence in each round; compare the footprint of both processes after a tenth and at the end."""
    blocks = scattered(pair.source, pair.sink, 3 * rounds, 100)
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    ends, before = (pair.source, pair.sink), [Footprint(0, 0, 0)] * 2
    for number, part in enumerate(parts(blocks, rounds)):
        if number == rounds // 10:
            before = [end.footprint() for end in ends]
        pair = connect(pair.source, pair.sink)
        expect(
            pair.source.move(pair.to_sink, part, pair.grant()) == part.nbytes,
            "a transfer reported a wrong number of bytes",
        )
        pair.source.fence(pair.to_sink)
        pair.sink.fence(pair.to_source)
        if between is not None:
            between(pair)
    same(pair.sink.contents(), wanted)
    for name, end, first in zip(("source", "sink"), ends, before, strict=True):
        limit = tuple(a + b for a, b in zip(first, GROWTH, strict=True))
        # A thread of a connection that the peer has closed needs a moment to end.
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

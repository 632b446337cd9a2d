"""Checks of many small blocks, as a change of the tensor-parallel width makes them.

A transport may gather such blocks, send them as one, and have the sink scatter them. `staging_slots` counts the slots
that it uses for that; none may be in use once all transfers have ended, also after failures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvroom.plan.blocks import Blocks

from .ends import End
from .stage import (
    SCRUB,
    CheckStage,
    Pair,
    Skipped,
    connect,
    expect,
    flood,
    lands,
    refused,
    settle,
    undisturbed,
    until,
    usable,
)

_RUN = 16  # adjoining pieces in a row, like the tokens of a page


def strided(source: End, sink: End, count: int, piece_bytes: int, *, wide: str, seed: int = 5) -> Blocks:
    """Return pieces that adjoin in rows of `_RUN`, but have gaps of their own size on the side `wide`.

    Rows are in random order on both sides, at odd addresses of the last pools. The last row is cut short.
    """
    generator, columns = np.random.default_rng(seed), []
    for end, name in ((source, "source"), (sink, "sink")):
        step = piece_bytes * (2 if name == wide else 1)
        row = generator.permutation(-(-count // _RUN)).astype(np.uint64) * np.uint64(_RUN * step)
        place = row[:, None] + np.arange(_RUN, dtype=np.uint64) * np.uint64(step)
        columns.append((np.uint64(end.addresses[-1] + 1) + place).ravel()[:count])
        expect(_RUN * step * row.size < end.sizes[-1], "the pieces fit into the pool")
    return Blocks(columns[0], columns[1], np.full(count, piece_bytes, np.uint64))


def _some(pair: Pair, **how: int) -> Blocks:
    return strided(pair.source, pair.sink, how.get("count", 4_005), how.get("piece_bytes", 512), wide="sink")


def moves_small_strided_blocks(stage: CheckStage) -> None:
    """Pieces of 96 to 512 bytes land, strided on the source or on the sink; afterwards no staging slot is in use."""
    pair = stage.pair()
    for piece_bytes, count in ((512, 4_005), (128, 15_001), (96, 3_333)):
        for wide in ("source", "sink"):
            lands(pair, strided(pair.source, pair.sink, count, piece_bytes, wide=wide))
    for name, end in (("source", pair.source), ("sink", pair.sink)):
        expect(not any(end.staging_slots().values()), f"the {name} keeps {end.staging_slots()} after all has landed")


def refuses_small_blocks_outside_the_grant(stage: CheckStage) -> None:
    """A sink that does the writing refuses a piece outside of the grant, and no byte of its batch lands."""
    pair = stage.pair()
    blocks = _some(pair)
    last = int(np.argmax(blocks.dst))
    within = np.arange(blocks.dst.size) != last
    grant = pair.grant_of(*(np.sort(blocks.dst[within]), blocks.length[within]))
    lands(pair, Blocks(*(column[within] for column in blocks)), grant)
    if not _sink_writes(pair):
        raise Skipped("the source does the writing over this transport")
    pair.sink.fill(SCRUB)
    text = refused(pair, blocks, grant)
    expect("granted" in text, f"the error does not mention the grant: {text}")
    expect(not any(pair.sink.staging_slots().values()), f"the sink keeps {pair.sink.staging_slots()} after a refusal")
    lands(pair, blocks)


def _sink_writes(pair: Pair) -> bool:
    return bool(pair.sink.staging_slots()) or pair.sink.revoke(pair.grant())


def refuses_small_blocks_under_a_grant_of_another(stage: CheckStage) -> None:
    """A sink that does the writing refuses a write under a grant that was offered to another peer only."""
    pair = stage.pair()
    other = connect(stage.open(), pair.sink)
    if not _sink_writes(pair):
        raise Skipped("the source does the writing over this transport")
    grant = pair.grant()
    text = refused(other, _some(other), grant)
    expect("not offered" in text, f"the error does not say that the grant was not offered to this peer: {text}")
    expect(not any(pair.sink.staging_slots().values()), f"the sink keeps {pair.sink.staging_slots()} after a refusal")
    lands(pair, _some(pair), grant)
    lands(other, _some(other))


def no_small_block_lands_after_a_revoke(stage: CheckStage) -> None:
    """If the sink does the writing, no byte lands after `revoke` has returned, also of transfers in flight."""
    pair = stage.pair()
    if not _sink_writes(pair):
        raise Skipped("the source does the writing over this transport")
    blocks, grant = _some(pair), pair.grant()
    tickets = flood(pair, blocks, grant)
    pair.source.outcome(tickets.pop(0))
    pair.sink.revoke(grant)
    undisturbed(pair.sink, lambda: tickets.extend(flood(pair, blocks, grant, 5)))
    expect(not any(settle(pair.source, tickets)[-5:]), "small blocks were moved under a revoked grant")
    _all_given_back(pair.sink)
    _all_given_back(pair.source)
    usable(pair, blocks)


def a_killed_writer_of_small_blocks_leaves_nothing(stage: CheckStage) -> None:
    """After SIGKILL of the source during transfers, a proven fence frees its slots; the sink serves another source."""
    pair = stage.pair()
    tickets = flood(pair, _some(pair), pair.grant())
    pair.source.outcome(tickets[0])
    stage.kill(pair.source)
    until(lambda: pair.sink.fence(pair.to_source), "`fence` of a dead writer returns True")
    _all_given_back(pair.sink)
    undisturbed(pair.sink)
    again = connect(stage.open(), pair.sink)
    lands(again, _some(again))


def a_killed_sink_of_small_blocks_leaves_nothing(stage: CheckStage) -> None:
    """After SIGKILL of the sink during transfers, all of them end; the source frees its slots and serves another."""
    pair = stage.pair()
    tickets = flood(pair, _some(pair), pair.grant())
    pair.source.outcome(tickets.pop(0))
    stage.kill(pair.sink)
    settle(pair.source, tickets)
    _all_given_back(pair.source)
    again = connect(pair.source, stage.open())
    lands(again, _some(again))


def _all_given_back(end: End) -> None:
    until(lambda: not any(end.staging_slots().values()), "every staging slot is given back")


CHECKS: tuple[Callable[[CheckStage], None], ...] = (
    moves_small_strided_blocks,
    refuses_small_blocks_outside_the_grant,
    refuses_small_blocks_under_a_grant_of_another,
    no_small_block_lands_after_a_revoke,
    a_killed_writer_of_small_blocks_leaves_nothing,
    a_killed_sink_of_small_blocks_leaves_nothing,
)

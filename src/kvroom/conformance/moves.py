"""Checks of transfers that succeed: numbers and sizes of blocks, regions, directions, peers, batches over any limit."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kvroom.plan.blocks import Blocks

from .ends import Bytes, End
from .stage import (
    BIG,
    MAX_BLOCK_BYTES,
    SMALL,
    SOON_S,
    CheckStage,
    Pair,
    apply,
    connect,
    expect,
    lands,
    one_block,
    parts,
    same,
    scattered,
    settle,
    spread,
)

MAX_BLOCKS = 200_000
PEERS = 8
_DESCRIPTION_BYTES = 64 << 10
_REGIONS = 160  # a key region and a value region for each of 80 layers


def moves_scattered_unaligned_blocks(stage: CheckStage) -> None:
    """2,000 blocks of 1 to 6,000 bytes at odd addresses land at their destinations, and no other byte changes."""
    pair = stage.pair()
    lands(pair, scattered(pair.source, pair.sink, 2_000, 6_000))


def moves_one_byte(stage: CheckStage) -> None:
    """The smallest transfer: one block of one byte."""
    pair = stage.pair(SMALL)
    lands(pair, one_block(pair.source, pair.sink, 1, at=4097))


def moves_200_000_single_bytes(stage: CheckStage) -> None:
    """The largest number of blocks of the smallest size, in one transfer."""
    pair = stage.pair()
    lands(pair, spread(pair.source, pair.sink, np.ones(MAX_BLOCKS)))


def moves_200_000_blocks(stage: CheckStage) -> None:
    """The largest number of blocks, of 1 to 30 bytes, in one transfer."""
    pair = stage.pair()
    lands(pair, scattered(pair.source, pair.sink, MAX_BLOCKS, 30))


def moves_blocks_of_16_mib(stage: CheckStage) -> None:
    """Two blocks of the largest size in one transfer, into two regions."""
    pair = stage.pair(BIG)
    lands(pair, spread(pair.source, pair.sink, [MAX_BLOCK_BYTES] * 2))


def moves_mixed_sizes(stage: CheckStage) -> None:
    """One transfer with blocks of 1 byte, of 16 MiB and of every magnitude in between, in random order."""
    pair = stage.pair(BIG)
    between = 2 ** np.random.default_rng(5).uniform(0, 20, 100)
    lands(pair, spread(pair.source, pair.sink, [1, MAX_BLOCK_BYTES, *between.astype(int)]))


def moves_no_blocks(stage: CheckStage) -> None:
    """A transfer of no blocks succeeds with 0 bytes."""
    pair = stage.pair(SMALL)
    empty = np.empty(0, np.uint64)
    lands(pair, Blocks(empty, empty, empty))


def skips_empty_blocks(stage: CheckStage) -> None:
    """Blocks of length 0 are skipped, among other blocks and in a transfer that has no others."""
    pair = stage.pair(SMALL)
    blocks = scattered(pair.source, pair.sink, 50, 300)
    blocks.length[::3] = 0
    lands(pair, blocks)
    blocks.length[:] = 0
    lands(pair, blocks)


def moves_across_regions_that_touch(stage: CheckStage) -> None:
    """If memory is registered in adjoining pieces, a block may begin in one piece and end in the next."""
    pair = stage.pair(SMALL, pieces=7)
    lands(pair, scattered(pair.source, pair.sink, 40, 9_000))
    lands(pair, one_block(pair.source, pair.sink, SMALL[-1] - 3))


def serves_many_regions(stage: CheckStage) -> None:
    """With the regions of a model of 80 layers, a description stays within 64 KiB, and blocks land in all regions."""
    pair = stage.pair((3 << 12,) * _REGIONS)
    nbytes = max(len(end.describe()) for end in (pair.source, pair.sink))
    expect(nbytes <= _DESCRIPTION_BYTES, f"a description has {nbytes} bytes, more than {_DESCRIPTION_BYTES}")
    lands(pair, scattered(pair.source, pair.sink, 20 * _REGIONS, 500))


def keeps_transfers_apart(stage: CheckStage) -> None:
    """Forty transfers in flight at the same time all land, and each reports its own number of bytes."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 4_000, 2_000)
    _all_land([(pair, parts(blocks, 40))])


def takes_many_small_transfers(stage: CheckStage) -> None:
    """2,000 transfers of three blocks each, all submitted before the first is waited for, land."""
    pair = stage.pair(SMALL)
    blocks = scattered(pair.source, pair.sink, 6_000, 90)
    _all_land([(pair, parts(blocks, 2_000))])


def takes_batches_over_any_limit(stage: CheckStage) -> None:
    """Four transfers of 100,000 blocks each, queued together, land: the transport splits and paces them itself."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 400_000, 12)
    _all_land([(pair, parts(blocks, 4))])


def moves_both_ways_at_once(stage: CheckStage) -> None:
    """Each end sends from one part of its memory while its peer writes into another part: twenty transfers each way."""
    pair = stage.pair()
    back = pair.turned()
    there = scattered(pair.source, pair.sink, 3_000, 2_000, read=(0, 1), write=(2,))
    home = scattered(back.source, back.sink, 3_000, 2_000, read=(0, 1), write=(2,))
    _all_land([(pair, parts(there, 20)), (back, parts(home, 20))])


def serves_many_sinks(stage: CheckStage) -> None:
    """One source writes to eight sinks at the same time, each in a process of its own."""
    source, *sinks = stage.several(1 + PEERS)
    pairs = [connect(source, sink) for sink in sinks]
    expect(len({pair.to_sink for pair in pairs}) == PEERS, "two peers have the same handle")
    _all_land([(pair, parts(scattered(source, pair.sink, 500, 800, seed=pair.to_sink), 5)) for pair in pairs])


def serves_many_sources(stage: CheckStage) -> None:
    """Eight sources, each in a process of its own, write to one sink at the same time."""
    sink, *sources = stage.several(1 + PEERS)
    pairs = [connect(source, sink) for source in sources]
    expect(len({pair.to_source for pair in pairs}) == PEERS, "two peers have the same handle")
    _all_land(  # one seed gives every source the same set of places in the sink; each writes its own share of them
        [(pair, parts(parts(scattered(pair.source, sink, 4_000, 110), PEERS)[i], 5)) for i, pair in enumerate(pairs)]
    )


def submit_does_not_wait_for_the_peer(stage: CheckStage) -> None:
    """`submit` returns while the sink's process is stopped, also for more bytes than buffers hold; all land later."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 4_000, 4_000), pair.grant()
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    with stage.stopped(pair.sink):
        start_s = time.monotonic()
        tickets = [pair.source.begin(pair.to_sink, blocks, grant) for _ in range(20)]
        took_s = time.monotonic() - start_s
    expect(took_s < SOON_S, f"20 submits took {took_s:.1f} s while the peer was stopped")
    expect(all(settle(pair.source, tickets)), "a transfer failed because the peer was stopped for a moment")
    same(pair.sink.contents(), wanted)


def _all_land(work: list[tuple[Pair, list[Blocks]]]) -> None:
    """Submit every batch of every pair, in turn, before waiting for any; then compare the memory of all sinks."""
    wanted: dict[int, tuple[End, list[Bytes]]] = {}
    memory = {id(pair.source): pair.source.contents() for pair, _ in work}
    for pair, batches in work:
        _, after = wanted.setdefault(id(pair.sink), (pair.sink, pair.sink.contents()))
        for batch in batches:
            apply(batch, pair.source, pair.sink, memory[id(pair.source)], after)
    grants = [pair.grant() for pair, _ in work]
    tickets = []
    for turn in range(max(len(batches) for _, batches in work)):
        for (pair, batches), grant in zip(work, grants, strict=True):
            tickets.append((pair.source, pair.source.begin(pair.to_sink, batches[turn], grant), batches[turn].nbytes))
    for source, ticket, nbytes in tickets:
        moved = source.outcome(ticket)
        expect(moved == nbytes, f"a transfer reported {moved} bytes, expected {nbytes}")
    for sink, after in wanted.values():
        same(sink.contents(), after)


CHECKS: tuple[Callable[[CheckStage], None], ...] = (
    moves_scattered_unaligned_blocks,
    moves_one_byte,
    moves_200_000_single_bytes,
    moves_200_000_blocks,
    moves_blocks_of_16_mib,
    moves_mixed_sizes,
    moves_no_blocks,
    skips_empty_blocks,
    moves_across_regions_that_touch,
    serves_many_regions,
    keeps_transfers_apart,
    takes_many_small_transfers,
    takes_batches_over_any_limit,
    moves_both_ways_at_once,
    serves_many_sinks,
    serves_many_sources,
    submit_does_not_wait_for_the_peer,
)

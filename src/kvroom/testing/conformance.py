"""What any transport must do, as a list of checks: `CHECKS`. Somebody who writes a transport runs them all.

A check is a function of a `Pair`: two ends, already connected to each other, with memory of known content. It raises
`AssertionError`, or whatever the transport raised by mistake. Every check compares all memory of the sink, the
unregistered part included, with what it must hold. `run` makes the pairs; the sink should be in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks
from kvroom.testing.ends import GUARD_BYTES, Bytes, End, Host

POOLS = (3 << 20, 1 << 20, 5 << 20)  # registered bytes of each pool; `GUARD_BYTES` behind it are not registered


class Pair(NamedTuple):
    """A source and a sink that are connected: `to_sink` is the source's handle, `to_source` the sink's."""

    source: End
    sink: End
    to_sink: int
    to_source: int

    def grant(self, end: End | None = None) -> bytes:
        """Leave to write into everything that the sink (or `end`) registered."""
        end = end or self.sink
        return end.grant(np.array(end.addresses, np.uint64), np.array(POOLS, np.uint64))


def expect(condition: bool, text: str) -> None:
    """Raise `AssertionError` with the text unless the condition holds; unlike `assert`, under `python -O` too."""
    if not condition:
        raise AssertionError(text)


def scattered(source: End, sink: End, count: int, longest: int, seed: int = 7) -> Blocks:
    """Return `count` unaligned blocks of 1 to `longest` bytes over all registered pools, disjoint in the sink."""
    generator = np.random.default_rng(seed)
    share = np.array(POOLS) / sum(POOLS)
    pool = np.sort(generator.choice(len(POOLS), count, p=share))
    length = generator.integers(1, longest, count, endpoint=True, dtype=np.uint64)
    src, dst = np.empty(count, np.uint64), np.empty(count, np.uint64)
    for index in range(len(POOLS)):
        mine = pool == index
        gap = generator.integers(0, 3, int(mine.sum()), dtype=np.uint64)
        stop = np.cumsum(length[mine] + gap)
        expect(not stop.size or int(stop[-1]) <= POOLS[index], "the check asks for more blocks than its pools hold")
        dst[mine] = np.uint64(sink.addresses[index]) + stop - length[mine]
        offset = generator.integers(0, np.uint64(POOLS[index]) - length[mine], dtype=np.uint64)
        src[mine] = np.uint64(source.addresses[index]) + offset
    order = generator.permutation(count)
    return Blocks(src[order], dst[order], length[order])


def one_block(source: End, sink: End, nbytes: int, at: int = 0, start: int = 3) -> Blocks:
    """Return one block between the largest pools, from `start` in the source's to `at` in the sink's."""
    src, dst = source.addresses[2] + start, sink.addresses[2] + at
    return Blocks(*(np.array([value], np.uint64) for value in (src, dst, nbytes)))


def apply(blocks: Blocks, source: End, sink: End, read: list[Bytes], written: list[Bytes]) -> None:
    """Do the copies in `written`, the expected contents of the sink."""
    for src, dst, length in zip(*(part.tolist() for part in blocks), strict=True):
        written_pool, to = _locate(sink, dst)
        read_pool, start = _locate(source, src)
        written[written_pool][to : to + length] = read[read_pool][start : start + length]


def _locate(end: End, address: int) -> tuple[int, int]:
    for index, (base, nbytes) in enumerate(zip(end.addresses, POOLS, strict=True)):
        if base <= address < base + nbytes + GUARD_BYTES:
            return index, address - base
    raise AssertionError(f"{address:#x} is in no pool")


def same(got: list[Bytes], wanted: list[Bytes]) -> None:
    """Compare all pools byte by byte."""
    for index, (left, right) in enumerate(zip(got, wanted, strict=True)):
        wrong = np.flatnonzero(left != right)
        expect(not wrong.size, f"pool {index}: {wrong.size} bytes are wrong, the first at {wrong[:1]}")


def _lands(pair: Pair, blocks: Blocks, grant: bytes | None = None) -> None:
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    moved = pair.source.move(pair.to_sink, blocks, pair.grant() if grant is None else grant)
    expect(moved == blocks.nbytes, f"the transfer says {moved} bytes, not {blocks.nbytes}")
    same(pair.sink.contents(), wanted)


def _refused(pair: Pair, blocks: Blocks, grant: bytes) -> str:
    wanted = pair.sink.contents()
    try:
        pair.source.move(pair.to_sink, blocks, grant)
    except TransportError as error:
        same(pair.sink.contents(), wanted)
        return str(error)
    raise AssertionError("the transfer was not refused")


def moves_scattered_unaligned_blocks(pair: Pair) -> None:
    _lands(pair, scattered(pair.source, pair.sink, 2_000, 6_000))


def moves_many_blocks(pair: Pair) -> None:
    _lands(pair, scattered(pair.source, pair.sink, 20_000, 600))


def moves_one_byte(pair: Pair) -> None:
    _lands(pair, one_block(pair.source, pair.sink, 1, at=4097))


def moves_one_big_block(pair: Pair) -> None:
    _lands(pair, one_block(pair.source, pair.sink, (4 << 20) + 7, at=5))


def moves_no_blocks(pair: Pair) -> None:
    empty = np.empty(0, np.uint64)
    expect(pair.source.move(pair.to_sink, Blocks(empty, empty, empty), pair.grant()) == 0, "no blocks are 0 bytes")


def skips_empty_blocks(pair: Pair) -> None:
    blocks = scattered(pair.source, pair.sink, 50, 300)
    blocks.length[::3] = 0
    _lands(pair, blocks)


def keeps_transfers_apart(pair: Pair) -> None:
    """Many transfers under way at once, each of some blocks, all land."""
    blocks = scattered(pair.source, pair.sink, 4_000, 2_000)
    wanted = pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), wanted)
    grant, tickets = pair.grant(), []
    for start in range(0, 4_000, 100):
        part = Blocks(*(values[start : start + 100] for values in blocks))
        tickets.append((pair.source.begin(pair.to_sink, part, grant), part.nbytes))
    for ticket, nbytes in tickets:
        expect(pair.source.outcome(ticket) == nbytes, "a transfer does not say how many bytes it moved")
    same(pair.sink.contents(), wanted)


def moves_both_ways_at_once(pair: Pair) -> None:
    """Each end reads one part of its memory while another part is written by its peer."""
    half = 5 << 19
    there = one_block(pair.source, pair.sink, 2 << 20)
    back = one_block(pair.sink, pair.source, 2 << 20, at=half, start=half)
    wanted_there, wanted_back = pair.sink.contents(), pair.source.contents()
    apply(there, pair.source, pair.sink, pair.source.contents(), wanted_there)
    apply(back, pair.sink, pair.source, pair.sink.contents(), wanted_back)
    first = pair.source.begin(pair.to_sink, there, pair.grant())
    second = pair.sink.begin(pair.to_source, back, pair.grant(pair.source))
    expect(pair.source.outcome(first) == pair.sink.outcome(second) == 2 << 20, "both move 2 MiB")
    same(pair.sink.contents(), wanted_there)
    same(pair.source.contents(), wanted_back)


def refuses_unregistered_destination(pair: Pair) -> None:
    """One bad block among good ones: nothing is written, and the next transfer succeeds."""
    blocks, grant = scattered(pair.source, pair.sink, 100, 1_000), pair.grant()
    blocks.dst[57] = pair.sink.addresses[1] + POOLS[1]
    expect("outside" in _refused(pair, blocks, grant), "the refusal says that a block lies outside")
    _lands(pair, scattered(pair.source, pair.sink, 100, 1_000), grant)


def refuses_destination_across_the_border(pair: Pair) -> None:
    """A block that begins in registered memory and ends one byte behind it."""
    _refused(pair, one_block(pair.source, pair.sink, 100, at=POOLS[2] - 99), pair.grant())


def refuses_wrapping_destination(pair: Pair) -> None:
    """Address plus length overflows 64 bits."""
    blocks = one_block(pair.source, pair.sink, 100)
    blocks.dst[0] = 2**64 - 50
    _refused(pair, blocks, pair.grant())


def refuses_unregistered_source(pair: Pair) -> None:
    blocks = one_block(pair.source, pair.sink, 100)
    blocks.src[0] = pair.source.addresses[2] + POOLS[2]
    _refused(pair, blocks, pair.grant())


def enforces_grants_if_it_proves_them(pair: Pair) -> None:
    """Where `revoke` is proof: outside the grant nothing lands, under a revoked or unknown grant neither."""
    blocks = one_block(pair.source, pair.sink, 4_096, at=8_192)
    granted = pair.sink.grant(blocks.dst, blocks.length)
    _lands(pair, blocks, granted)
    if pair.sink.revoke(granted):
        _refused(pair, blocks, granted)
        beside = pair.sink.grant(blocks.dst + np.uint64(1), blocks.length)
        _refused(pair, blocks, beside)
        _refused(pair, blocks, bytes(len(granted)))
    _lands(pair, blocks)


def fences_and_connects_again(pair: Pair) -> None:
    """A fenced handle is of no use; a new one is. Fencing twice does no harm."""
    blocks = one_block(pair.source, pair.sink, 4_096)
    proven = pair.sink.fence(pair.to_source)
    pair.source.fence(pair.to_sink)
    pair.source.fence(pair.to_sink)
    _refused(pair, blocks, pair.grant())
    to_sink, to_source = pair.source.connect(pair.sink.describe()), pair.sink.connect(pair.source.describe())
    expect(not proven or to_source != pair.to_source, "a handle that was forgotten is not used again")
    _lands(pair._replace(to_sink=to_sink, to_source=to_source), blocks)


def fence_of_a_writer_is_proof_if_it_says_so(pair: Pair) -> None:
    """After a proven fence on the sink, what the source submits does not land."""
    blocks, grant = one_block(pair.source, pair.sink, 4_096), pair.grant()
    _lands(pair, blocks, grant)
    if pair.sink.fence(pair.to_source):
        _refused(pair, one_block(pair.source, pair.sink, 4_096, at=1 << 20), grant)


def close_finishes_what_is_under_way(pair: Pair) -> None:
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    for _ in range(20):
        pair.source.begin(pair.to_sink, blocks, grant)
    pair.source.close()
    expect(pair.source.unfinished() == 0, "after close every future is done")
    pair.source.close()
    ticket = pair.source.begin(pair.to_sink, blocks, grant)
    try:
        pair.source.outcome(ticket)
    except TransportError:
        return
    raise AssertionError("a closed transport moved blocks")


def a_killed_peer_fails_transfers_and_is_fenced(pair: Pair) -> None:
    """SIGKILL in the middle: every future is done soon, and `fence` is proof, for there is no writer any more."""
    if pair.sink.kill is None:
        return
    blocks, grant = scattered(pair.source, pair.sink, 20_000, 600), pair.grant()
    tickets = [pair.source.begin(pair.to_sink, blocks, grant) for _ in range(50)]
    pair.source.outcome(tickets[0])
    pair.sink.kill()
    tickets.append(pair.source.begin(pair.to_sink, blocks, grant))
    ends = [_ends_well(pair.source, ticket) for ticket in tickets]
    expect(not ends[-1], "a transfer to a dead process failed")
    expect(pair.source.fence(pair.to_sink), "a dead peer is fenced with proof")


def _ends_well(end: End, ticket: int) -> bool:
    try:
        end.outcome(ticket, 10.0)
    except TransportError:
        return False
    return True


CHECKS: tuple[Callable[[Pair], None], ...] = (
    moves_scattered_unaligned_blocks,
    moves_many_blocks,
    moves_one_byte,
    moves_one_big_block,
    moves_no_blocks,
    skips_empty_blocks,
    keeps_transfers_apart,
    moves_both_ways_at_once,
    refuses_unregistered_destination,
    refuses_destination_across_the_border,
    refuses_wrapping_destination,
    refuses_unregistered_source,
    enforces_grants_if_it_proves_them,
    fences_and_connects_again,
    fence_of_a_writer_is_proof_if_it_says_so,
    close_finishes_what_is_under_way,
    a_killed_peer_fails_transfers_and_is_fenced,
)


def run(check: Callable[[Pair], None], host: Host | None, name: str, *, shared: bool = False, **options: Any) -> None:
    """Run one check over transport `name`: the source in this process, the sink in `host` (or here, if None)."""
    open_sink = End.here if host is None else host.open
    source = End.here(name, options, POOLS, 1, shared)
    try:
        sink = open_sink(name, options, POOLS, 2, shared)
        try:
            pair = Pair(source, sink, source.connect(sink.describe()), sink.connect(source.describe()))
            check(pair)
        finally:
            if host is None or host.alive:
                sink.close()
    finally:
        source.close()

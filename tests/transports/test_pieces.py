"""Pieces of registered memory, compared with a check of each single byte."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided.pieces import Pieces, by_pieces, cut_at_borders

ranges = st.lists(
    st.builds(MemoryRange, st.integers(1, 80), st.integers(1, 30), st.just("cpu")), min_size=1, max_size=6
)


class Case(NamedTuple):
    here: Pieces
    there: Pieces
    blocks: Blocks


def covered(memory: list[MemoryRange]) -> list[int]:
    return sorted({byte for piece in memory for byte in range(piece.address, piece.address + piece.nbytes)})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return blocks within the registered memory, whatever borders they cross."""
    listed = draw(ranges), draw(ranges)
    rows = []
    for _ in range(draw(st.integers(1, 10))):
        src, dst = (draw(st.sampled_from(covered(memory))) for memory in listed)
        room = min(_run(covered(listed[0]), src), _run(covered(listed[1]), dst))
        rows.append((src, dst, draw(st.integers(1, room))))
    return Case(Pieces(listed[0]), Pieces(listed[1]), Blocks(*(u64(column) for column in zip(*rows, strict=True))))


def _run(known: list[int], start: int) -> int:
    """Return the number of bytes from `start` on that are registered without a gap."""
    rest = set(known)
    stop = start
    while stop in rest:
        stop += 1
    return stop - start


def copies(blocks: Blocks) -> list[tuple[int, int]]:
    return [(s + i, d + i) for s, d, n in zip(*(part.tolist() for part in blocks), strict=True) for i in range(n)]


@given(ranges)
def test_pieces_cover_every_byte_once(memory: list[MemoryRange]) -> None:
    pieces = Pieces(memory)
    bytes_of = [byte for piece in pieces.memory for byte in range(piece.address, piece.address + piece.nbytes)]
    assert bytes_of == covered(memory)
    assert pieces.start.tolist() == [piece.address for piece in pieces.memory]


@given(cases())
def test_cut_blocks_are_the_same_copies_and_cross_no_border(case: Case) -> None:
    blocks = cut_at_borders(case.blocks, case.here, case.there)
    assert copies(blocks) == copies(case.blocks)
    assert (blocks.length > 0).all()
    for pieces, address in ((case.here, blocks.src), (case.there, blocks.dst)):
        assert np.array_equal(pieces.find(address), pieces.find(address + blocks.length - np.uint64(1)))


@given(cases())
def test_pairs_of_pieces_are_the_same_copies(case: Case) -> None:
    pairs = by_pieces(case.blocks, case.here, case.there)
    assert len({(pair.here, pair.there) for pair in pairs}) == len(pairs)
    found: list[tuple[int, int]] = []
    for pair in pairs:
        mine, theirs = case.here.memory[pair.here], case.there.memory[pair.there]
        assert ((pair.offset + pair.length) <= mine.nbytes).all()
        assert ((pair.peer_offset + pair.length) <= theirs.nbytes).all()
        src, dst = pair.offset + np.uint64(mine.address), pair.peer_offset + np.uint64(theirs.address)
        found += copies(Blocks(src, dst, pair.length))
    assert sorted(found) == sorted(copies(case.blocks))

"""Copies of many small blocks by NumPy, compared with a loop over the blocks; the bytes around them stay unchanged."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.plan.blocks import U64, Blocks
from kvroom.transports.kit import gather
from kvroom.transports.kit.ranges import u64

SIZE = 1 << 14
LENGTHS = (
    st.lists(st.integers(1, 40), min_size=1, max_size=60)  # of many sizes
    | st.lists(st.sampled_from([16, 48]), min_size=1, max_size=60)
    | st.builds(lambda size, count: [size] * count, st.integers(1, 200), st.integers(1, 40))
)


def buffer(seed: int) -> gather.Bytes:
    return np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)


def address(array: gather.Bytes) -> int:
    return int(array.__array_interface__["data"][0])


def places(lengths: list[int], gaps: list[int], base: int, order: list[int]) -> U64:
    """Return disjoint places, in this order, with these gaps; a gap of 0 makes two neighbours one range."""
    at, found = 1, [0] * len(lengths)
    for i in order:
        found[i] = base + at
        at += lengths[i] + gaps[i]
    assert at < SIZE
    return u64(found)


@given(LENGTHS, st.data())
def test_every_way_does_what_a_loop_does(lengths: list[int], data: st.DataObject) -> None:
    count, length = len(lengths), u64(lengths)
    gaps = data.draw(st.lists(st.sampled_from([0, 0, 1, 7]), min_size=count, max_size=count))
    ways = st.permutations(range(count)) | st.just(list(range(count)))
    source, sink = buffer(1), buffer(2)
    src = places(lengths, gaps, address(source), data.draw(ways))
    dst = places(lengths, gaps[::-1], address(sink), data.draw(ways))
    wanted, packed = sink.copy(), bytearray()
    for a, b, n in zip(src.tolist(), dst.tolist(), lengths, strict=True):
        start, at = a - address(source), b - address(sink)
        wanted[at : at + n] = source[start : start + n]
        packed += source[start : start + n].tobytes()
    chunk = data.draw(st.sampled_from([16, 100, 1 << 20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather.chunks, "__defaults__", (chunk,))
        for way in ("copy", "pack"):
            target = sink.copy()
            moved = dst - np.uint64(address(sink)) + np.uint64(address(target))
            if way == "copy":
                gather.copy(Blocks(src, moved, length))
            else:
                between = buffer(3)
                gather.pack(src, length, address(between) + 3)
                assert between[3 : 3 + len(packed)].tobytes() == packed
                assert np.array_equal(between[3 + len(packed) :], buffer(3)[3 + len(packed) :])
                gather.scatter(between[3 : 3 + len(packed)], moved, length)
            assert np.array_equal(target, wanted)
    assert gather.gathered(src, length).tobytes() == packed


@given(LENGTHS)
def test_neighbours_become_one_and_keep_their_bytes(lengths: list[int]) -> None:
    start = np.cumsum([0, *lengths[:-1]])
    apart = np.arange(len(lengths)) // 3  # a gap behind every third
    runs = gather.merged(u64((1000 + start + apart).tolist()), u64(lengths))
    assert runs.address.size == -(-len(lengths) // 3)
    assert int(runs.length.sum()) == sum(lengths)
    assert (runs.address[1:] > runs.address[:-1] + runs.length[:-1]).all()


def test_chunks_are_full_and_a_long_block_is_one_by_itself() -> None:
    assert gather.chunks(u64([3, 3, 3, 20, 1, 1]), 6) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert gather.chunks(u64([]), 6) == []


def test_memory_is_what_is_there() -> None:
    cell = ctypes.create_string_buffer(b"abcdef")
    view = gather.memory(ctypes.addressof(cell), 4)
    view[1] = ord("x")
    assert cell.raw[:6] == b"axcdef"
    where, size = gather.whole(view)
    assert (where.tolist(), size.tolist()) == ([ctypes.addressof(cell)], [4])

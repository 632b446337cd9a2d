"""The parts below the transports: ranges, batches, segments, handles, pools; compared with slow, obvious code."""

from __future__ import annotations

import gc
import os
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.errors import ConfigurationError, TransportError
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.batches import cut, normal, split
from kvroom.transports.kit.iovec import IOV_MAX, Segments
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.pool import allocate, shared_pool
from kvroom.transports.kit.ranges import Ranges, u64
from kvroom.transports.kit.transfers import TransferRecord

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=8)
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(spans, spans)
def test_ranges_against_sets_of_bytes(known: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    covered = {byte for start, length in known for byte in range(start, start + length)}
    outside = [i for i, (start, length) in enumerate(asked) if not covered.issuperset(range(start, start + length))]
    ranges = Ranges(u64(s for s, _ in known), u64(n for _, n in known))
    assert ranges.first_outside(u64(s for s, _ in asked), u64(n for _, n in asked)) == (outside[0] if outside else None)
    assert (ranges.start[1:] > ranges.stop[:-1]).all()


@pytest.mark.parametrize(("address", "length"), [(2**64 - 5, 10), (100, 2**64 - 1), (2**63, 2**63)])
def test_ranges_do_not_wrap_around(address: int, length: int) -> None:
    assert Ranges(u64([50]), u64([100])).first_outside(u64([address]), u64([length])) == 0


@given(sizes, st.integers(1, 20))
def test_split_is_the_same_copies(lengths: list[int], piece_bytes: int) -> None:
    length = u64(lengths)
    whole = Blocks(u64([1000]) + np.cumsum(length) * np.uint64(3), u64([9000]) + np.cumsum(length), length)
    parts = split(whole, piece_bytes)

    def copies(blocks: Blocks) -> list[tuple[int, int]]:
        return [(s + i, d + i) for s, d, n in zip(*(p.tolist() for p in blocks), strict=True) for i in range(n)]

    assert copies(parts) == copies(whole)
    assert int(parts.length.max()) <= piece_bytes


@given(sizes, st.integers(1, 7), st.integers(1, 120))
def test_runs_cover_everything_within_the_limits(lengths: list[int], most_blocks: int, most_bytes: int) -> None:
    whole = Blocks(u64(range(len(lengths))), u64(range(len(lengths))), u64(lengths))
    blocks, runs = cut(whole, most_blocks, most_bytes)
    assert blocks.nbytes == sum(lengths)
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(blocks.length.size))
    for start, stop in runs:
        assert stop - start <= most_blocks
        assert blocks.length[start:stop].sum() <= most_bytes


@given(sizes, st.lists(st.integers(1, 80), max_size=60))
def test_segments_are_consumed_from_the_front(lengths: list[int], moves: list[int]) -> None:
    address = [1000 * i for i in range(1, len(lengths) + 1)]
    expected = [base + i for base, length in zip(address, lengths, strict=True) for i in range(length)]
    segments = Segments(u64(address), u64(lengths))
    for move in moves:
        taken = min(move, segments.left)
        segments.advance(taken)
        expected = expected[taken:]
        rest = segments._iov[segments._index :].tolist()
        assert [base + i for base, length in rest for i in range(length)] == expected
        assert segments.left == len(expected)


def test_a_window_is_at_most_what_the_kernel_takes() -> None:
    segments = Segments(np.arange(3000, dtype=np.uint64), np.ones(3000, np.uint64))
    first, count = segments.window()
    assert count == IOV_MAX
    segments.advance(2900)
    assert segments.window() == (first + 16 * 2900, 100)


def test_blocks_of_unequal_sizes_are_refused() -> None:
    with pytest.raises(TransportError, match="three arrays of one size"):
        normal(Blocks(u64([1]), u64([1, 2]), u64([1])))


def test_handles_are_never_used_again_for_another_peer() -> None:
    handles: PeerTable[str] = PeerTable("some")
    first = handles.add(b"a", "one")
    assert handles.add(b"a", "two") == first
    assert handles.get(first) == "one"
    handles.detach(first)
    assert handles.of(b"a") is None
    assert handles.find(first) == "one"
    assert handles.add(b"a", "three") == first
    assert handles.get(first) == "three"
    assert handles.forget(first) == "three"
    assert handles.forget(first) is None
    assert handles.add(b"a", "four") == first + 1
    for unknown in (0, first + 2):
        with pytest.raises(TransportError, match="not a peer handle"):
            handles.find(unknown)


def test_a_plain_pool_is_zeroed_and_writable() -> None:
    pool = allocate(100_000)
    view = np.frombuffer(pool.buffer, np.uint8)
    assert view.size == pool.nbytes == 100_000
    assert not view.any()
    assert view.ctypes.data == pool.address
    with pytest.raises(BufferError):
        pool.close()
    del view
    pool.close()


def test_a_shared_pool_can_be_found_and_never_shrinks() -> None:
    pool = allocate(100_000, shared=True)
    assert shared_pool(pool.address + 10, 50) is pool
    assert shared_pool(pool.address + 99_990, 11) is None
    assert pool.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 10)
    pool.close()
    with pytest.raises(OSError):
        os.fstat(pool.fd)


def test_a_pool_of_no_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="-1 bytes"):
        allocate(-1)


def test_a_closed_pool_is_not_found_at_its_old_address() -> None:
    pool = allocate(4096, shared=True)
    assert shared_pool(pool.address, 4096) is pool
    pool.close()
    assert shared_pool(pool.address, 4096) is None  # a later mapping at this address is not of this pool


BLOCKS = Blocks(u64([1, 2]), u64([3, 4]), u64([10, 5]))


def test_a_record_that_did_not_fail_ends_with_its_bytes() -> None:
    record = TransferRecord(BLOCKS)
    assert not record.future.done()
    record.finish()
    assert record.future.result(0) == 15


def test_a_record_ends_with_its_first_error() -> None:
    record = TransferRecord(BLOCKS)
    record.fail(TransportError("the first"))
    record.fail(TransportError("the second"))
    record.finish()
    with pytest.raises(TransportError, match="the first"):
        record.future.result(0)


@pytest.mark.parametrize("error", [None, TransportError("failed")])
def test_what_is_to_be_called_afterwards_is_called_before_the_future_is_done(error: TransportError | None) -> None:
    record, seen = TransferRecord(BLOCKS), list[bool]()
    record.afterwards = lambda: seen.append(record.future.done())
    record.error = error
    record.finish()
    assert seen == [False]
    assert record.future.exception(0) is error


def _know(record: TransferRecord) -> None: ...


def test_a_finished_record_is_not_kept_by_what_it_has_called() -> None:
    record = TransferRecord(BLOCKS)
    record.afterwards = partial(_know, record)
    kept = weakref.ref(record)
    gc.disable()
    try:
        record.finish()
        del record
        assert kept() is None
    finally:
        gc.enable()

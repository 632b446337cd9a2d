"""`Transport.submit` makes the same promises for every transport, whatever its `_move` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import Transfer, Transport
from kvroom.transports.kit.ranges import Ranges, u64
from kvroom.transports.kit.transfers import finished

HERE, THERE = MemoryRange(1000, 100), MemoryRange(5000, 100)


class Noted(Transport):
    """Peer 1 registered `THERE`, peer 2 checks each write itself, and there is no other."""

    name: ClassVar[str] = "noted"

    def __init__(self, refusal: str = "") -> None:
        self.moved: list[Blocks] = []
        self._refusal = refusal

    def register(self, memory: Sequence[MemoryRange]) -> None:
        self._memory = Ranges.of(memory)

    def describe(self) -> bytes:
        return b""

    def connect(self, description: bytes) -> int:
        return description[0]

    def _peer_memory(self, peer: int) -> Ranges | None:
        if peer not in (1, 2):
            raise TransportError(f"noted: {peer} is not a peer handle")
        return Ranges.of([THERE]) if peer == 1 else None

    def _move(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if self._refusal:
            raise TransportError(self._refusal)
        self.moved.append(blocks)
        return finished(blocks.nbytes)

    def fence(self, peer: int) -> bool:
        return True

    def close(self) -> None: ...


def noted(refusal: str = "") -> Noted:
    made = Noted(refusal)
    made.register([HERE])
    return made


def blocks(*rows: tuple[int, int, int]) -> Blocks:
    return Blocks(*(u64(row[i] for row in rows) for i in range(3)))


def test_what_moves_is_in_normal_form() -> None:
    transport = noted()
    given = Blocks(np.array([1000, 1, 1010]), np.array([5000, 1, 5010]), np.array([10, 0, 5]))
    assert transport.submit(1, given, b"").result(0) == 15
    (moved,) = transport.moved
    assert [part.tolist() for part in moved] == [[1000, 1010], [5000, 5010], [10, 5]]
    assert all(part.dtype == np.uint64 and part.flags.c_contiguous for part in moved)


@pytest.mark.parametrize(
    ("peer", "row", "says"),
    [
        (1, (999, 5000, 10), "source block 1 of 2 .* lies outside the memory that this side registered"),
        (1, (1000, 4999, 10), "destination block 1 of 2 .* lies outside the memory that the peer registered"),
        (1, (1095, 5000, 6), "source block 1"),
        (1, (1000, 5095, 6), "destination block 1"),
        (2, (1095, 1, 6), "source block 1"),
        (3, (1000, 5000, 10), "3 is not a peer handle"),
    ],
)
def test_blocks_that_cannot_be_moved_fail_the_whole_transfer(peer: int, row: tuple[int, int, int], says: str) -> None:
    transport = noted()
    with pytest.raises(TransportError, match=says):
        transport.submit(peer, blocks((1000, 5000, 10), row), b"").result(0)
    assert not transport.moved
    assert transport.submit(1, blocks((1000, 5000, 10)), b"").result(0) == 10


def test_where_the_peer_looks_at_each_write_no_destination_is_compared() -> None:
    transport = noted()
    assert transport.submit(2, blocks((1000, 1, 10)), b"").result(0) == 10


def test_before_memory_is_registered_no_block_is_moved() -> None:
    transport = Noted()
    with pytest.raises(TransportError, match="source block 0 of 1"):
        transport.submit(2, blocks((1000, 5000, 10)), b"").result(0)
    assert not transport.moved


@pytest.mark.parametrize("empty", [blocks(), blocks((1, 1, 0)), blocks((1, 1, 0), (2, 2, 0))])
def test_a_transfer_of_no_bytes_is_done_at_once(empty: Blocks) -> None:
    transport = noted()
    assert transport.submit(1, empty, b"").result(0) == 0
    assert not transport.moved
    with pytest.raises(TransportError, match="3 is not a peer handle"):
        transport.submit(3, empty, b"").result(0)


@pytest.mark.parametrize("bad", [Blocks(u64([1]), u64([]), u64([1])), Blocks(u64([1]), u64([1]), u64([]))])
def test_arrays_of_different_sizes_fail_the_transfer(bad: Blocks) -> None:
    transport = noted()
    with pytest.raises(TransportError, match="three arrays of one size"):
        transport.submit(1, bad, b"").result(0)


def test_what_refuses_to_move_fails_the_future_and_raises_nothing() -> None:
    transfer = noted("no more today").submit(1, blocks((1000, 5000, 10)), b"")
    with pytest.raises(TransportError, match="no more today"):
        transfer.result(0)

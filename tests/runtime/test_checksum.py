"""The optional checksum: over exactly the bytes handed over, equal on both sides, and a mismatch ends the room."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from manager_helpers import Pair

from identities import PROMPT
from kvroom import KVPoll, KVReceiver, KVSender, RoomFailed
from kvroom.core.inputs import SendPages
from kvroom.core.messages import Offer
from kvroom.errors import ConfigurationError
from kvroom.plan import KVLayout, array_regions, strips
from kvroom.runtime.checksum import checksum, unreadable
from kvroom.runtime.page_lists import HeldPages, held_by_source
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool


@pytest.fixture(params=["memory", "tcp", "auto"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        made = Pair(request.param, stack, checksum=True)
        yield made
        made.check_clean()


@pytest.fixture
def held() -> Iterator[Pair]:
    """A pair over the memory transport, with transfers held until the test continues them."""
    with contextlib.ExitStack() as stack:
        made = Pair("memory", stack, checksum=True)
        made_by = made.transports[0]
        assert isinstance(made_by, MemoryTransport)
        made_by.faults.hold()
        yield made
        made_by.faults.release()
        made.check_clean()


def send_and_change_a_byte(pair: Pair, sender: KVSender, receiver: KVReceiver) -> None:
    """Send two chunks; a byte of the first changes on the sink before the second has landed."""
    source = faults(pair)
    sender.send([5], stop=4)
    source.faults.wait_held(1)
    source.faults.release(1)
    pair.until(lambda: receiver.poll() is KVPoll.Transferring)
    pair.sink_pool.array[1, 0, 9, 3, 1, 7] ^= 1
    sender.send([6], stop=8, last=True)
    source.faults.wait_held(1)
    source.faults.release(1)


def faults(pair: Pair) -> MemoryTransport:
    source = pair.transports[0]
    assert isinstance(source, MemoryTransport)
    return source


def test_it_is_xxh3_over_the_bytes_of_the_window_and_no_others() -> None:
    pool = TestPool(layers=2, pages=16, page_tokens=4)
    pool.fill(3)
    strip, _ = strips(pool.layout, pool.layout)
    pages, start, stop = [7, 2, 11], 6, 15
    expected = pool.tokens(pages, 12)[:, :, start - 4 : stop - 4]
    held = {"": [HeldPages(pages, start, stop)]}
    value = checksum(strip, held, pool.layout, pool.layout)
    assert value == xxhash.xxh3_64_intdigest(np.ascontiguousarray(expected).data)
    outside = pool.array.copy()
    pool.array[:] ^= 255
    for page, tokens in zip(pages, (slice(2, 4), slice(0, 4), slice(0, 3)), strict=True):
        pool.array[:, :, page, tokens] = outside[:, :, page, tokens]
    assert checksum(strip, held, pool.layout, pool.layout) == value
    pool.array[1, 1, 11, 2, 1, 15] ^= 1
    assert checksum(strip, held, pool.layout, pool.layout) != value
    pool.close()


def test_pages_larger_than_what_is_gathered_at_once() -> None:
    pool = TestPool(layers=1, pages=5, page_tokens=64, heads=8, head_bytes=4096)  # 2 MiB a page
    pool.fill(4)
    strip, _ = strips(pool.layout, pool.layout)
    expected = np.ascontiguousarray(pool.tokens([4, 0, 2, 1], 250)[:, :, 3:])
    held = {"": [HeldPages([4, 0, 2, 1], 3, 250)]}
    assert checksum(strip, held, pool.layout, pool.layout) == xxhash.xxh3_64_intdigest(expected.data)
    pool.close()


def test_the_pages_of_all_chunks_make_one_window() -> None:
    pool = TestPool(page_tokens=4)
    chunks = (
        SendPages(pages=(5, 6), stop=6, start=0),
        SendPages(pages=(6, 1), stop=10, start=6),
        SendPages(pages=(), stop=10, last=True, start=10),
    )
    for start, pages in ((0, [5, 6, 1]), (5, [6, 1])):
        offer = Offer(room=7, generation=1, start=start, stop=10, pages=(), identity=PROMPT)
        assert held_by_source(pool.layout, offer, chunks, ()) == {"": [HeldPages(pages, start, 10)]}
    assert held_by_source(
        pool.layout, Offer(room=7, generation=1, start=10, stop=10, pages=(), identity=PROMPT), chunks, ()
    ) == {"": []}
    halves = held_by_source(
        pool.layout, Offer(room=7, generation=1, start=0, stop=10, pages=(), identity=PROMPT), chunks, ((0, 5), (6, 10))
    )
    assert halves == {"": [HeldPages([5, 6], 0, 5), HeldPages([6, 1], 6, 10)]}
    pool.close()


def test_device_memory_is_refused_before_a_room_depends_on_it() -> None:
    regions = array_regions(4096, (8, 4, 2), (8, 2, 1), "PTD", itemsize=1, components=("k",), device="cuda:1")
    assert "cuda:1" in str(unreadable(KVLayout(regions, dtype="uint8")))
    on_the_host = array_regions(9000, (8, 4, 2), (8, 2, 1), "PTD", itemsize=1, components=("v",))
    assert "cuda:1" in str(unreadable(KVLayout(on_the_host + regions, dtype="uint8")))
    assert unreadable(KVLayout(on_the_host, dtype="uint8")) is None


def test_a_room_with_equal_checksums_succeeds_on_both_sides(pair: Pair) -> None:
    with (
        pair.sender(7) as sender,
        pair.receiver(7) as receiver,
    ):
        receiver.send_metadata([2, 11], tokens=10, decode_prefix_len=6)
        sender.send([5, 6], stop=7)
        sender.send([6, 1], stop=10, last=True)
        assert receiver.wait(10).nbytes == sender.wait(10).nbytes > 0
    np.testing.assert_array_equal(pair.sink_pool.array[:, :, 2, 2:], pair.source_pool.array[:, :, 6, 2:])


def test_a_room_whose_tokens_are_all_there_already(pair: Pair) -> None:
    with (
        pair.sender(7) as sender,
        pair.receiver(7) as receiver,
    ):
        receiver.send_metadata([], tokens=8, decode_prefix_len=8)
        sender.send([5, 6], stop=8, last=True)
        assert receiver.wait(10).nbytes == sender.wait(10).nbytes == 0


def test_a_byte_that_changed_fails_the_room_on_both_sides_with_both_values(held: Pair) -> None:
    with (
        held.sender(7) as sender,
        held.receiver(7) as receiver,
    ):
        receiver.send_metadata([9, 2], tokens=8)
        send_and_change_a_byte(held, sender, receiver)
        with pytest.raises(RoomFailed, match=r"phase VERIFYING .*checksum mismatch: .* 0x\w{16}, .* 0x\w{16}") as here:
            receiver.wait(10)
        with pytest.raises(RoomFailed) as there:
            sender.wait(10)
        assert str(here.value) == str(there.value)
        one, other = re.findall(r"0x\w{16}", str(here.value))
        assert one != other


def test_without_being_asked_nothing_is_compared(held: Pair) -> None:
    with (
        held.sender(7) as sender,
        held.receiver(7) as receiver,
    ):
        receiver.send_metadata([9, 2], tokens=8, checksum=False)
        send_and_change_a_byte(held, sender, receiver)
        receiver.wait(10)
        sender.wait(10)


def test_a_receiver_refuses_a_checksum_over_device_memory(held: Pair) -> None:
    regions = array_regions(4096, (8, 4, 2), (8, 2, 1), "PTD", itemsize=1, components=("k",), device="cuda:1")
    ours = held.decode.driver.layout
    with held.sender(7), held.receiver(7) as receiver:
        held.decode.driver.layout = KVLayout(regions, dtype="uint8")
        with pytest.raises(ConfigurationError, match="cuda:1"):
            receiver.send_metadata([1], tokens=4)
        held.decode.driver.layout = ours

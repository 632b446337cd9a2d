"""Two managers hand rooms over: real directory, links and loop threads, and every transport that moves bytes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from manager_helpers import TIMES, Pair

from identities import PROMPT
from kvroom import (
    Audit,
    KVBootstrapServer,
    KVManager,
    KVPoll,
    KVReceiver,
    KVSender,
    LocalRoomError,
    PlanError,
    RoomFailed,
    RoomInUse,
    Timeouts,
)
from kvroom.bootstrap import client
from kvroom.errors import BootstrapError, ConfigurationError
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool

TRANSPORTS = ["memory", "tcp", "auto"]


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        made = Pair(request.param, stack)
        yield made
        made.check_clean()


@pytest.fixture
def slow() -> Iterator[Pair]:
    """A pair over the memory transport, with every transfer held until the test continues it."""
    with contextlib.ExitStack() as stack:
        made = Pair("memory", stack)
        source = made.transports[0]
        assert isinstance(source, MemoryTransport)
        source.faults.hold()
        yield made
        source.faults.release()
        made.check_clean()


def test_a_room_is_handed_over(pair: Pair) -> None:
    before = pair.sink_pool.array.copy()
    with (
        pair.sender(7) as sender,
        pair.receiver(7) as receiver,
    ):
        receiver.send_metadata([9, 2, 11], tokens=10)
        sender.send([5, 6], stop=8)
        sender.send([1], stop=10, last=True, aux=b"first token")
        result = receiver.wait(10)
        assert sender.wait(10).tokens == result.tokens == 10
        assert (receiver.poll(), sender.poll()) == (KVPoll.Success, KVPoll.Success)
        assert result.aux == receiver.aux == b"first token"
        assert result.nbytes == pair.sink_pool.layout.window_nbytes(0, 10)
        assert result.latency_s > 0
    np.testing.assert_array_equal(pair.sink_pool.tokens([9, 2, 11], 10), pair.source_pool.tokens([5, 6, 1], 10))
    before[:, :, [9, 2]] = pair.sink_pool.array[:, :, [9, 2]]
    before[:, :, 11, :2] = pair.sink_pool.array[:, :, 11, :2]
    np.testing.assert_array_equal(pair.sink_pool.array, before)  # no other byte has changed


def test_a_room_that_says_success_has_its_result(pair: Pair) -> None:
    """An engine may see the status before the manager's thread has woken the callers of `wait`."""
    sender, receiver = pair.prefill.sender(7, identity=PROMPT), pair.decode.receiver(pair.addr, 7, identity=PROMPT)
    with sender, receiver:
        receiver.send_metadata([5, 3], tokens=8)
        sender.send([1, 2], stop=8, last=True)
        receiver.wait(20)
        receiver._ended = Future()  # as if they had not been woken yet
        assert receiver.poll() is KVPoll.Success
        assert receiver.wait(0).tokens == 8


def test_the_prefill_may_send_before_the_decode_side_has_asked(pair: Pair) -> None:
    with pair.sender(7) as sender:
        sender.send([5], stop=4, last=True)
        assert not sender.answered
        with pair.receiver(7) as receiver:
            receiver.send_metadata([9], tokens=4)
            receiver.wait(10)
        sender.wait(10)
        assert sender.decode_prefix_len == 0
    np.testing.assert_array_equal(pair.sink_pool.tokens([9], 4), pair.source_pool.tokens([5], 4))


def test_an_offer_waits_for_its_prefill(pair: Pair) -> None:
    with pair.receiver(7) as receiver:
        receiver.send_metadata([9], tokens=4)
        with pair.sender(7) as sender:
            sender.send([5], stop=4, last=True)
            receiver.wait(10)
            sender.wait(10)


def test_only_the_rest_of_a_known_prefix_moves(pair: Pair) -> None:
    with (
        pair.sender(7) as sender,
        pair.receiver(7) as receiver,
    ):
        receiver.send_metadata([2, 11], tokens=10, decode_prefix_len=6)
        sender.send([5, 6, 1], stop=10, last=True)
        assert receiver.wait(10).nbytes == pair.sink_pool.layout.window_nbytes(6, 10)
        sender.wait(10)
        assert sender.decode_prefix_len == 6
    assert not pair.sink_pool.array[:, :, 2, :2].any()  # tokens 4 and 5 were there already
    np.testing.assert_array_equal(pair.sink_pool.array[:, :, 2, 2:], pair.source_pool.array[:, :, 6, 2:])


def test_many_rooms_at_once(pair: Pair) -> None:
    async def hand_over(room: int) -> None:
        page = room % 16
        with (
            pair.sender(room) as sender,
            pair.receiver(room) as receiver,
        ):
            sender.send([page], stop=4, last=True)
            receiver.send_metadata([31 - page], tokens=4)
            await asyncio.gather(sender, receiver)

    async def run() -> None:
        for start in range(0, 160, 16):
            await asyncio.gather(*[hand_over(room) for room in range(start, start + 16)])

    asyncio.run(run())
    for page in range(16):
        np.testing.assert_array_equal(pair.sink_pool.tokens([31 - page], 4), pair.source_pool.tokens([page], 4))
    assert pair.decode.counters().succeeded == 160


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_an_abort_reaches_the_other_side_with_its_cause(pair: Pair, who: str) -> None:
    released: queue.Queue[tuple[int, ...]] = queue.Queue()
    with (
        pair.sender(7, on_release=released.put) as sender,
        pair.receiver(7, on_release=released.put) as receiver,
    ):
        receiver.send_metadata([9], tokens=4)
        sender.send([5], stop=2)
        pair.until(lambda: sender.answered)
        handles: dict[str, KVSender | KVReceiver] = {"prefill": sender, "decode": receiver}
        handles[who].abort("the client went away")
        texts = []
        for handle in (sender, receiver):
            with pytest.raises(RoomFailed, match="the client went away") as failed:
                handle.wait(10)
            texts.append(str(failed.value))
            assert handle.poll().name == "Failed"
    assert sorted([released.get(timeout=10), released.get(timeout=10)]) == [(5,), (9,)]


def test_pages_are_held_until_the_writer_is_quiet(slow: Pair) -> None:
    """Law 6, over a transport that cannot prove a drain by itself."""
    sink = slow.transports[1]
    source = slow.transports[0]
    assert isinstance(sink, MemoryTransport)
    assert isinstance(source, MemoryTransport)
    sink.faults.proof = False
    released: queue.Queue[tuple[int, ...]] = queue.Queue()
    with (
        slow.sender(7) as sender,
        slow.receiver(7, on_release=released.put) as receiver,
    ):
        receiver.send_metadata([9], tokens=4)
        sender.send([5], stop=4, last=True)
        source.faults.wait_held(1)
        receiver.abort("too late")
        with pytest.raises(RoomFailed, match="too late"):
            receiver.wait(10)
        with pytest.raises(RoomFailed, match="too late"):
            sender.wait(10)
    assert not receiver.released
    assert slow.decode.audit().draining == 1
    source.faults.release()
    assert released.get(timeout=10) == (9,)
    assert receiver.released


def test_after_a_lost_link_the_peer_is_asked_again_without_another_room(slow: Pair) -> None:
    """Law 6: the link breaks during a transfer, the transport proves nothing, the writer lives."""
    source, sink = slow.transports
    assert isinstance(source, MemoryTransport)
    assert isinstance(sink, MemoryTransport)
    source.faults.proof = sink.faults.proof = False
    released: queue.Queue[tuple[int, ...]] = queue.Queue()
    with (
        slow.sender(7) as sender,
        slow.receiver(7, on_release=released.put) as receiver,
    ):
        receiver.send_metadata([9], tokens=4)
        sender.send([5], stop=4, last=True)
        source.faults.wait_held(1)
        slow.decode.loop.call(lambda: slow.decode._links.drop(slow.prefill.me, "cut by the test"))
        for handle in (sender, receiver):
            with pytest.raises(RoomFailed, match="cut by the test"):
                handle.wait(10)
        assert not receiver.released
        source.faults.release()
        assert released.get(timeout=20) == (9,)


def test_clear_before_a_number_is_assigned_and_twice(pair: Pair) -> None:
    for handle in (pair.prefill.sender(), pair.receiver()):
        handle.clear()
        handle.clear()
        handle.init(7)
        with pytest.raises(RoomFailed, match="room 7 failed"):
            handle.wait(10)


def test_a_room_that_is_open_is_refused_the_second_time(pair: Pair) -> None:
    with pair.sender(7), pair.sender(7) as second:
        with pytest.raises(RoomInUse, match="room 7 is already open on the prefill side"):
            second.wait(10)
        assert pair.prefill.audit().sources == 1


@pytest.mark.parametrize("room", [-1, 2**63, True, "7"])
def test_a_room_number_out_of_range_is_refused(pair: Pair, room: Any) -> None:
    with pytest.raises(LocalRoomError, match="give an int of at least 0, below"):
        pair.sender(room)


def test_what_an_engine_must_not_do_raises_and_sends_nothing(pair: Pair) -> None:
    with pair.sender() as sender, pair.receiver() as receiver:
        with pytest.raises(LocalRoomError, match="call init first"):
            sender.send([1], stop=4)
        with pytest.raises(LocalRoomError, match="call init first"):
            receiver.send_metadata([1], tokens=4)
        sender.init(7)
        receiver.init(7)
        with pytest.raises(LocalRoomError, match="a handle takes one number"):
            sender.init(8)
        with pytest.raises(PlanError):
            sender.send([1, 2], stop=4)
        with pytest.raises(PlanError):
            receiver.send_metadata([99], tokens=4)
        with pytest.raises(PlanError, match="got decode_prefix_len 5, stop 4 and tokens 4"):
            receiver.send_metadata([1], tokens=4, decode_prefix_len=5)
        sender.send([1], stop=4, last=True)
        with pytest.raises(LocalRoomError, match="the last chunk was sent before"):
            sender.send([1], stop=4)
        receiver.send_metadata([1], tokens=4)
        with pytest.raises(LocalRoomError, match="pages were offered before"):
            receiver.send_metadata([1], tokens=4)
        receiver.wait(10)


def test_different_lengths_fail_both_sides_with_the_same_sentence(pair: Pair) -> None:
    with (
        pair.sender(7) as sender,
        pair.receiver(7) as receiver,
    ):
        receiver.send_metadata([9], tokens=4)
        sender.send([5], stop=3, last=True)
        texts = []
        for handle in (sender, receiver):
            with pytest.raises(RoomFailed) as failed:
                handle.wait(10)
            texts.append(str(failed.value))
    assert texts[0] == texts[1]
    assert "the prefill side has 3 tokens, the decode side offered pages for 4" in texts[0]


def test_a_directory_that_is_not_there_fails_the_room_with_its_address() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack, timeouts=Timeouts(bootstrap_s=0.5))
        with (
            pair.decode.receiver("127.0.0.1:1", 7, identity=PROMPT) as receiver,
            pytest.raises(RoomFailed, match=r"127\.0\.0\.1:1"),
        ):
            receiver.wait(20)
        pair.check_clean()


def test_a_decode_side_may_ask_before_the_prefill_side_is_there() -> None:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(KVBootstrapServer())
        pools = TestPool(), TestPool()
        for pool in pools:
            stack.callback(pool.close)
        decode = stack.enter_context(KVManager(pools[1].layout, transport="tcp"))
        with decode.receiver(directory.address, 7, identity=PROMPT) as receiver:
            receiver.send_metadata([9], tokens=4)
            prefill = stack.enter_context(KVManager(pools[0].layout, transport="tcp", register_with=directory.address))
            with prefill.sender(7, identity=PROMPT) as sender:
                sender.send([5], stop=4, last=True)
                receiver.wait(20)


def test_a_prefill_that_closes_ends_its_rooms_on_the_decode_side() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack)
        with pair.receiver(7) as receiver:
            receiver.send_metadata([9], tokens=4)
            with pair.sender(7) as sender:
                sender.send([5], stop=2)
                pair.until(lambda: receiver.poll() is KVPoll.Transferring)
                pair.prefill.close()
            with pytest.raises(RoomFailed, match="the manager was closed"):
                receiver.wait(10)
        assert pair.decode.wait_idle(10)
        assert pair.decode.audit() == Audit()


def test_a_restarted_prefill_serves_the_same_decode_side() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack)
        for round_number in range(2):
            with (
                pair.sender(7) as sender,
                pair.receiver(7) as receiver,
            ):
                sender.send([5], stop=4, last=True)
                receiver.send_metadata([round_number], tokens=4)
                receiver.wait(10)
            if round_number == 0:
                pair.prefill.close()
                pair.prefill = stack.enter_context(
                    KVManager(pair.source_pool.layout, transport="tcp", register_with=pair.addr, timeouts=TIMES)
                )
        pair.check_clean()


def test_layouts_that_do_not_fit_fail_the_room_and_name_both() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack)
        other = TestPool(head_bytes=32)
        stack.callback(other.close)
        decode = stack.enter_context(KVManager(other.layout, transport="tcp"))
        with (
            decode.receiver(pair.addr, 7, identity=PROMPT) as receiver,
            pytest.raises(RoomFailed, match=r"32.*16|16.*32"),
        ):
            receiver.wait(10)


def test_transports_that_differ_are_one_clear_error() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack)
        pool = TestPool()
        stack.callback(pool.close)
        decode = stack.enter_context(KVManager(pool.layout, transport="local"))
        with (
            decode.receiver(pair.addr, 7, identity=PROMPT) as receiver,
            pytest.raises(RoomFailed, match=r"this side moves blocks by 'local' and .* by 'tcp'"),
        ):
            receiver.wait(10)


def test_a_port_in_use_is_said_and_nothing_is_left_running(pair: Pair) -> None:
    port = int(pair.prefill.address.rpartition(":")[2])
    pool = TestPool()
    with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is in use"):
        KVManager(pool.layout, transport="memory", port=port)
    pool.close()


def test_a_directory_that_is_not_there_stops_the_prefill_from_starting() -> None:
    pool = TestPool()
    with pytest.raises(BootstrapError, match=r"127\.0\.0\.1:1"):
        KVManager(pool.layout, transport="memory", register_with="127.0.0.1:1")
    pool.close()


def test_beyond_loopback_a_secret_is_required() -> None:
    pool = TestPool()
    with pytest.raises(ConfigurationError, match="secret"):
        KVManager(pool.layout, host="0.0.0.0", advertise_host="127.0.0.1", transport="memory")
    pool.close()


def test_a_wrong_secret_fails_the_room_and_says_so() -> None:
    """The decode side's directory knows its secret, and lists a prefill rank that has another one."""
    ours, theirs = b"a shared secret of enough bytes", b"another secret, long enough"
    with contextlib.ExitStack() as stack:
        pair = Pair("tcp", stack, secret=ours)
        pool = TestPool()
        stack.callback(pool.close)
        decode = stack.enter_context(KVManager(pool.layout, transport="tcp", secret=theirs))
        listing = stack.enter_context(KVBootstrapServer(secret=theirs)).address
        (rank,) = asyncio.run(client.listed(pair.addr, secret=ours))
        asyncio.run(client.register(listing, rank, secret=theirs))
        differ = pytest.raises(RoomFailed, match=r"the shared secrets of .* differ")
        with decode.receiver(listing, 7, identity=PROMPT) as receiver, differ:
            receiver.wait(10)
        with (
            pair.sender(8) as sender,
            pair.receiver(8) as good,
        ):
            good.send_metadata([9], tokens=4)
            sender.send([5], stop=4, last=True)
            good.wait(10)
        pair.check_clean()


def test_rooms_can_be_looked_at(slow: Pair) -> None:
    source = slow.transports[0]
    assert isinstance(source, MemoryTransport)
    with (
        slow.sender(7) as sender,
        slow.receiver(7) as receiver,
    ):
        receiver.send_metadata([9], tokens=4)
        sender.send([5], stop=4, last=True)
        source.faults.wait_held(1)
        (view,) = slow.prefill.rooms()
        assert (view.room, view.side, view.phase, view.status) == (7, "prefill", "SENDING", "Transferring")
        assert view.peers == (slow.decode.address,)
        assert view.waits_until_s is not None
        source.faults.release()
        receiver.wait(10)
        assert "memory" in slow.prefill.peers()[slow.decode.address]


def test_after_close_rooms_have_ended_and_no_new_one_opens() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        sender = pair.sender(7)
        later = pair.prefill.sender()
        pair.prefill.close()
        pair.prefill.close()
        with pytest.raises(RoomFailed, match="the manager was closed"):
            sender.wait(10)
        with pytest.raises(LocalRoomError, match="this manager is closed"):
            later.init(8)
        later.abort()
        later.clear()
        with pytest.raises(ConfigurationError, match="this manager is closed"):
            pair.prefill.audit()

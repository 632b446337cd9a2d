"""Rooms that end early, by the hundred, at every moment: nothing is left on either side, and no byte lands late."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from manager_helpers import Pair

from kvroom import KVReceiver, KVSender, RoomFailed, Timeouts
from kvroom.transports import probe
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.soak.leftovers import find_leftovers

FIRST = 3_141_592_653_589_793_238  # not a constant of any library
ROOMS = 500
PATIENT = Timeouts(bootstrap_s=2, waiting_s=20, stall_s=20, drain_s=2, decline_s=0.5)
LINKING = Timeouts(bootstrap_s=20, waiting_s=20, stall_s=20, drain_s=2, decline_s=0.5)
"""Timeouts of the decode side, which has to set up links."""


@pytest.fixture(params=["memory", "tcp", "auto", "nixl", "mooncake"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if missing := probe(request.param).missing:
        pytest.skip(f"{request.param} cannot run here: {missing[0].what}")
    with contextlib.ExitStack() as stack:
        settings = {"trusted_fabric": request.param == "mooncake"}
        made = Pair(request.param, stack, settings=settings, timeouts=PATIENT, decode_timeouts=LINKING)
        yield made
        made.check_clean()


def receive(pair: Pair, room: int) -> KVReceiver:
    receiver = pair.receiver(room)
    receiver.send_metadata([room % 32], tokens=4)
    return receiver


def before_init(pair: Pair, room: int) -> None:
    for handle in (pair.prefill.sender(), pair.receiver()):
        handle.abort()
        handle.clear()


def after_metadata(pair: Pair, room: int) -> None:
    sender, receiver = pair.sender(room), receive(pair, room)
    for handle in (receiver, sender):
        handle.abort()
        handle.clear()


def sink_aborts_while_the_source_sends(pair: Pair, room: int) -> None:
    sender, receiver = pair.sender(room), receive(pair, room)
    sender.send([room % 16], stop=2)
    receiver.abort("too late")
    receiver.clear()
    sender.send([room % 16], stop=4, last=True)
    sender.clear()


def source_aborts_only(pair: Pair, room: int) -> None:
    sender, receiver = pair.sender(room), receive(pair, room)
    sender.abort("no")
    with pytest.raises(RoomFailed):
        receiver.wait(20)
    sender.clear()
    receiver.clear()


def send_is_queued_then_aborted(pair: Pair, room: int) -> None:
    sender = pair.sender(room)
    sender.send([room % 16], stop=4, last=True)
    sender.abort()
    sender.clear()


def metadata_after_the_source_cleared(pair: Pair, room: int) -> None:
    sender = pair.sender(room)
    sender.abort()
    sender.clear()
    receive(pair, room).clear()


def metadata_for_a_room_that_the_prefill_never_sees(pair: Pair, room: int) -> None:
    receive(pair, room).clear()


MOMENTS = [
    before_init,
    after_metadata,
    sink_aborts_while_the_source_sends,
    source_aborts_only,
    send_is_queued_then_aborted,
    metadata_after_the_source_cleared,
    metadata_for_a_room_that_the_prefill_never_sees,
]


@pytest.mark.sampled("pair", "moment")
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_500_aborted_rooms_leave_nothing(pair: Pair, moment: Callable[[Pair, int], None]) -> None:
    for room in range(ROOMS):
        moment(pair, room)
    pair.check_clean()


@pytest.mark.sampled  # each case walks through every object of the process
def test_no_object_of_the_process_keeps_a_room_of_any_moment(pair: Pair) -> None:
    """The tables state that they are empty; this test looks for itself."""
    rooms = range(FIRST + 1, FIRST + 1 + 100 * len(MOMENTS))
    for index, moment in enumerate(MOMENTS):
        for room in rooms[100 * index : 100 * (index + 1)]:
            moment(pair, room)
    pair.check_clean()
    left = find_leftovers(rooms.__contains__)
    assert left.entries == 0, left.where


@pytest.mark.parametrize("side", ["sink aborts", "source aborts"])
def test_a_page_that_was_reused_after_an_abort_gets_no_byte_of_the_old_room(side: str) -> None:
    """The old room's transfer is in flight when its page goes to the next room, and continues when that has ended."""
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        source = pair.transports[0]
        assert isinstance(source, MemoryTransport)
        source.faults.hold()
        released: queue.Queue[tuple[int, ...]] = queue.Queue()
        old_sender = pair.sender(1)
        old_sender.send([5], stop=4, last=True)
        old_receiver = pair.receiver(1, on_release=released.put)
        old_receiver.send_metadata([9], tokens=4)
        source.faults.wait_held(1)
        handles: list[KVSender | KVReceiver] = [old_receiver, old_sender]
        handles[side == "source aborts"].abort("enough")
        old_receiver.clear()
        assert released.get(timeout=10) == (9,)

        with (
            pair.sender(2) as sender,
            pair.receiver(2) as receiver,
        ):
            receiver.send_metadata([9], tokens=4)
            sender.send([6], stop=4, last=True)
            source.faults.wait_held(2)
            source.faults.release(1, newest=True)
            receiver.wait(10)
        source.faults.release()
        old_sender.clear()
        pair.check_clean()
        np.testing.assert_array_equal(pair.sink_pool.tokens([9], 4), pair.source_pool.tokens([6], 4))

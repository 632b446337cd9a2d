"""Every wait of a room has a deadline, and both sides end with the same sentence: room, side, phase, peer and cause.

Each case sets only the deadline that it tests to a fraction of a second, and only on the side that it tests.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest
from manager_helpers import TIMES, Pair

from kvroom import KVPoll, KVReceiver, KVSender, RoomFailed
from kvroom.transports.memory import MemoryTransport

SOON_S = 0.2


class Case(NamedTuple):
    """The side and the deadline that expires after `act`, and the sentence that both sides report then."""

    side: str
    deadline: str
    act: Callable[[Pair, KVSender, KVReceiver], None]
    says: str


def nothing_is_sent(pair: Pair, sender: KVSender, receiver: KVReceiver) -> None:
    receiver.send_metadata([9], tokens=4)


def only_the_first_chunk_is_sent(pair: Pair, sender: KVSender, receiver: KVReceiver) -> None:
    receiver.send_metadata([9, 2], tokens=8)
    sender.send([5], stop=4)
    faults(pair).faults.wait_held(1)
    faults(pair).faults.release(1)
    pair.until(lambda: receiver.poll() is KVPoll.Transferring)


def the_second_transfer_hangs(pair: Pair, sender: KVSender, receiver: KVReceiver) -> None:
    receiver.send_metadata([9, 2], tokens=8)
    sender.send([5], stop=4)
    sender.send([6], stop=8, last=True)
    faults(pair).faults.wait_held(2)
    faults(pair).faults.release(1)
    pair.until(lambda: receiver.poll() is KVPoll.Transferring)


def the_transfer_hangs(pair: Pair, sender: KVSender, receiver: KVReceiver) -> None:
    receiver.send_metadata([9], tokens=4)
    sender.send([5], stop=4, last=True)
    faults(pair).faults.wait_held(1)


CASES = [
    Case("decode", "waiting_s", nothing_is_sent, r"decode side in phase OFFERED .* for the first bytes from 127"),
    Case("prefill", "waiting_s", nothing_is_sent, r"prefill side in phase READY .* for the engine to send further"),
    Case("decode", "waiting_s", only_the_first_chunk_is_sent, r"decode side in phase RECEIVING .* further pages from"),
    Case("decode", "stall_s", the_second_transfer_hangs, r"decode side in phase RECEIVING .* for more bytes from"),
    Case("prefill", "waiting_s", only_the_first_chunk_is_sent, r"prefill side in phase SENDING .* the engine to send"),
    Case("prefill", "stall_s", the_transfer_hangs, r"prefill side in phase SENDING .* for its transfers to 127"),
    Case("decode", "waiting_s", the_transfer_hangs, r"decode side in phase OFFERED .* for the first bytes from 127"),
]


def faults(pair: Pair) -> MemoryTransport:
    source = pair.transports[0]
    assert isinstance(source, MemoryTransport)
    return source


def failure(handle: KVSender | KVReceiver) -> str:
    with pytest.raises(RoomFailed) as failed:
        handle.wait(10)
    return str(failed.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.side} {case.deadline}: {case.act.__name__}")
def test_a_deadline_ends_both_sides_with_one_sentence(case: Case) -> None:
    soon = msgspec.structs.replace(TIMES, **{case.deadline: SOON_S})
    options: dict[str, Any] = {"timeouts": soon, "decode_timeouts": TIMES}
    if case.side == "decode":
        options = {"timeouts": TIMES, "decode_timeouts": soon}
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack, **options)
        faults(pair).faults.hold()
        stack.callback(lambda: faults(pair).faults.release())
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            case.act(pair, sender, receiver)
            said = failure(receiver)
            assert failure(sender) == said
        assert re.match(f"room 7 failed on the {case.says}", said), said
        assert f"timed out after {SOON_S:g} s (" in said
        faults(pair).faults.release()
        pair.check_clean()


def test_a_prefill_whose_decode_never_comes_ends() -> None:
    with contextlib.ExitStack() as stack:
        soon = msgspec.structs.replace(TIMES, bootstrap_s=SOON_S)
        pair = Pair("memory", stack, timeouts=soon, decode_timeouts=TIMES)
        with pair.sender(7) as sender:
            sender.send([5], stop=4, last=True)
            said = failure(sender)
        assert said == (
            "room 7 failed on the prefill side in phase EXPECTED (peer none yet): "
            f"timed out after {SOON_S:g} s (bootstrap_s) waiting for a decode worker to offer pages"
        )
        assert pair.prefill.wait_idle(10)


def test_a_decode_whose_prefill_never_comes_is_told_so_by_the_other_side() -> None:
    with contextlib.ExitStack() as stack:
        soon = msgspec.structs.replace(TIMES, bootstrap_s=SOON_S)
        pair = Pair("memory", stack, timeouts=soon, decode_timeouts=TIMES)
        with pair.receiver(7) as receiver:
            receiver.send_metadata([9], tokens=4)
            said = failure(receiver)
        assert f"the prefill side got no request for this room within {SOON_S:g} s" in said
        assert said.startswith("room 7 failed on the prefill side in phase EXPECTED (peer 127.0.0.1:")
        assert pair.prefill.counters().early_expired == 1
        assert pair.prefill.wait_idle(10)


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_an_abort_is_heard_long_before_any_deadline(who: str) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            receiver.send_metadata([9], tokens=4)
            pair.until(lambda: sender.poll() is KVPoll.WaitingForInput)
            handles: list[KVSender | KVReceiver] = [sender, receiver]
            handles[who == "decode"].abort("the client went away")
            for handle in handles:
                assert failure(handle).endswith("the client went away")
        pair.check_clean()

"""Managers whose transports do not fit together, and transports that require a warning for the operator."""

from __future__ import annotations

import contextlib
import logging

import pytest
from manager_helpers import TIMES, Pair

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, KVPoll, KVReceiver, KVSender, RoomFailed
from kvroom.core.causes import Cause
from kvroom.transports import create
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool

CAUTION = "transport fake moves no bytes: the decode side's pages keep the content that they had before"


class NixlByName(MemoryTransport):
    """A transport named `nixl`. A manager that is refused needs no engine."""

    name = "nixl"


def managers(prefill: str, decode: str, stack: contextlib.ExitStack) -> tuple[KVManager, KVManager, str]:
    """A prefill and a decode manager with different transports, and their directory's address."""
    address = stack.enter_context(KVBootstrapServer()).address
    made = []
    for name, register_with in ((prefill, address), (decode, None)):
        pool = TestPool()
        stack.callback(pool.close)
        transport = NixlByName() if name == "nixl" else create(name)
        made.append(
            stack.enter_context(
                KVManager(pool.layout, transport=transport, register_with=register_with, timeouts=TIMES)
            )
        )
    return made[0], made[1], address


@pytest.mark.parametrize(
    ("prefill", "decode"), [("tcp", "nixl"), ("nixl", "tcp"), ("auto", "tcp"), ("tcp", "auto"), ("fake", "auto")]
)
def test_both_sides_fail_with_one_sentence_that_names_both_transports(prefill: str, decode: str) -> None:
    with contextlib.ExitStack() as stack:
        source, sink, address = managers(prefill, decode, stack)
        with source.sender(7, identity=PROMPT) as sender, sink.receiver(address, 7, identity=PROMPT) as receiver:
            receiver.send_metadata([1], tokens=4)
            sender.send([2], stop=4, last=True)
            said = [end_of(receiver), end_of(sender)]
        for text in said:
            assert f"this side moves blocks by {decode!r} and {source.me} by {prefill!r}; " in text
            assert "start both with the same --transport" in text
        assert said[0] == said[1]
        for manager in (source, sink):
            assert manager.wait_idle(10)
            assert manager.audit() == Audit()
            assert manager.counters().failed_by_cause == {Cause.INCOMPATIBLE: 1}


def test_memories_that_do_not_fit_end_both_sides_at_once_too() -> None:
    with contextlib.ExitStack() as stack:
        pools = TestPool(), TestPool(head_bytes=8)
        for pool in pools:
            stack.callback(pool.close)
        address = stack.enter_context(KVBootstrapServer()).address
        source = stack.enter_context(
            KVManager(pools[0].layout, transport="memory", register_with=address, timeouts=TIMES)
        )
        sink = stack.enter_context(KVManager(pools[1].layout, transport="memory", timeouts=TIMES))
        with source.sender(7, identity=PROMPT) as sender, sink.receiver(address, 7, identity=PROMPT) as receiver:
            said = [end_of(receiver), end_of(sender)]
        assert "cannot be a source" in said[0]
        assert said[0] == said[1]


def end_of(handle: KVReceiver | KVSender) -> str:
    with pytest.raises(RoomFailed) as failed:
        handle.wait(10)
    assert handle.poll() == KVPoll.Failed
    return str(failed.value)


def test_what_fake_hands_over_succeeds_on_both_sides_and_no_byte_has_moved(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("fake", stack)
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [CAUTION] * 2
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            receiver.send_metadata([9, 2], tokens=8)
            sender.send([5, 6], stop=8, last=True, aux=b"first token")
            result = receiver.wait(10)
            assert result.nbytes == sender.wait(10).nbytes == pair.sink_pool.layout.window_nbytes(0, 8)
            assert result.aux == b"first token"
            assert (receiver.poll(), sender.poll()) == (KVPoll.Success, KVPoll.Success)
            assert result.transport == "fake: selected by name, moves no bytes"
            assert list(pair.decode.peers().values()) == ["fake: selected by name, moves no bytes"]
        assert not pair.sink_pool.array.any()
        pair.check_clean()


def test_a_checksum_tells_that_fake_moved_nothing() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("fake", stack, checksum=True)
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            receiver.send_metadata([9], tokens=4)
            sender.send([5], stop=4, last=True)
            said = [end_of(receiver), end_of(sender)]
        assert "checksum mismatch" in said[0]
        assert said[0] == said[1]
        assert pair.decode.wait_idle(10)
        assert pair.prefill.wait_idle(10)
        assert pair.decode.audit() == pair.prefill.audit() == Audit()


def test_an_aborted_hand_off_over_fake_is_drained_at_once() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("fake", stack)
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            receiver.send_metadata([9], tokens=4)
            pair.until(lambda: sender.answered)
            receiver.abort("the client went away")
            assert end_of(receiver) == end_of(sender)
        pair.check_clean()


def test_a_transport_that_needs_no_caution_logs_none(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        Pair("auto", stack)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

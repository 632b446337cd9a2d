"""Errors inside the adapter and of the device: a call that fails ends its request, and no exception leaves it.

An exception that left a call would end SGLang's scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from sglang_helpers import new_prompt, wait_until
from sglangqueues import Pair, failure

from kvroom.adapters.sglang import receiver as receivers
from kvroom.adapters.sglang import sender as senders
from kvroom.adapters.sglang.rows import Rows
from kvroom.core.phases import KVPoll

FAULT = "internal error in kvroom's adapter: ValueError: planted"


@pytest.fixture
def two() -> Iterator[Pair]:
    """Return a pair whose transport is `memory`."""
    with Pair() as pair:
        yield pair


def planted(*_: Any, **__: Any) -> Any:
    raise ValueError("planted")


class Planted:
    """An object of which every attribute raises an error."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError("planted")


def fails_alone(side: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert side.poll() is KVPoll.Failed
    wait_until(lambda: FAULT in failure(side).failure_reason, "the room's own end, with the fault as its cause")
    assert any("internal error in kvroom's adapter; the request fails" in record.message for record in caplog.records)


@pytest.mark.parametrize("call", ["identify", "pop_decode_prefix_len", "send", "poll", "abort", "clear"])
def test_a_fault_in_a_call_of_the_sender_fails_its_request_only(
    two: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    source, sink = two.requests(new_prompt(40))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.ready(source)
    caplog.set_level(logging.ERROR)
    with monkeypatch.context() as patch:
        if call == "identify":
            patch.setattr(senders, "request_identity", planted)
        elif call == "send":
            patch.setattr(Rows, "read", planted)
        elif call == "poll":
            patch.setattr(type(sender.leg.handle), "poll", planted)
        elif call == "pop_decode_prefix_len":
            patch.setattr(two.prefill.manager, "kv_args", Planted())
        else:
            patch.setattr(type(sender.leg.handle), "abort_and_linger" if call == "abort" else "clear", planted)
        pages = two.prefill.slots(source, 0, 40)[::16] // 16
        arguments: dict[str, tuple[Any, ...]] = {"identify": (source, None), "send": (pages, [])}
        getattr(sender, call)(*arguments.get(call, ()))
    fails_alone(sender, caplog)
    assert FAULT in two.decode.failed(one)
    two.prefill.rows.free(source.metadata_buffer_index)
    two.decode.wait_released(sink)
    two.wait_idle()


@pytest.mark.parametrize("call", ["identify", "send_metadata", "poll", "clear"])
def test_a_fault_in_a_call_of_the_receiver_fails_its_request_only(
    two: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    source, sink = two.requests(new_prompt(40))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    receiver = one.kv_receiver
    caplog.set_level(logging.ERROR)
    with monkeypatch.context() as patch:
        if call == "identify":
            patch.setattr(receivers, "request_identity", planted)
            two.decode.offer(one)
        elif call == "send_metadata":
            patch.setattr(type(receiver.leg.handle), "send_metadata", planted)
            two.decode.offer(one)
        elif call == "poll":
            patch.setattr(Rows, "write", planted)
            two.decode.offer(one)
            two.prefill.run(source)
            wait_until(lambda: receiver.poll() is KVPoll.Failed, "the fault")
        else:
            two.decode.offer(one)
            patch.setattr(type(receiver.leg.handle), "clear", planted)
            receiver.clear()
    fails_alone(receiver, caplog)
    two.decode.failed(one)
    two.decode.wait_released(sink)
    if call != "poll":
        wait_until(lambda: sender.poll() is KVPoll.Failed, "the failure of the sender")
        assert FAULT in two.prefill.give_up(source).failure_reason
    two.wait_idle()


# -- a cached prefix that is sent early --------------------------------------------------------------------------------


class Event:
    """A double of `torch.cuda.Event`: a chunk may be read when it is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self._set: Future[None] = Future()

    def set(self) -> None:
        self._set.set_result(None)

    def synchronize(self) -> None:
        self._set.result(30)
        if self._error is not None:
            raise self._error


def early(two: Pair, event: Event) -> tuple[Any, Any]:
    """Send a cached prefix with an event, and then the rest. Return the source and SGLang's decode request."""
    source, sink = two.requests(new_prompt(60))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.ready(source)
    sender._early_send_wait_event = event
    two.prefill.send(source, 32)
    assert sender._early_send_wait_event is None
    return source, one


def test_pages_are_not_read_before_the_event_and_chunks_stay_in_order(two: Pair) -> None:
    event = Event()
    source, one = early(two, event)
    two.prefill.send(source)
    slots = two.prefill.slots(source, 0, 32)
    two.prefill.pool.k_buffer[0][slots] = 0  # the device has not written them yet
    assert source.disagg_kv_sender.poll() is KVPoll.WaitingForInput
    two.prefill.compute(source, 0, 32)
    event.set()
    two.prefill.finish(source)
    two.decode.finish(one)
    assert two.decode.wrong_tokens(one.req) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("CUDA error: an illegal address"),
            "the device failed before the cached prefix could be sent: CUD",
        ),
        (ValueError("planted"), FAULT),
    ],
)
def test_an_event_that_fails_fails_the_request(two: Pair, error: Exception, words: str) -> None:
    event = Event(error)
    source, one = early(two, event)
    event.set()
    wait_until(lambda: source.disagg_kv_sender.poll() is KVPoll.Failed, "the failure of the sender")
    assert words in two.prefill.give_up(source).failure_reason
    assert words in two.decode.failed(one)
    two.decode.wait_released(one.req)
    two.wait_idle()


def test_an_abort_while_the_event_is_awaited_ends_the_room(two: Pair) -> None:
    event = Event()
    source, one = early(two, event)
    source.disagg_kv_sender.abort()
    two.prefill.rows.free(source.metadata_buffer_index)
    assert "SGLang aborted the request" in two.decode.failed(one)
    event.set()
    two.decode.wait_released(one.req)
    two.wait_idle()
    two.hand_over(new_prompt(30))

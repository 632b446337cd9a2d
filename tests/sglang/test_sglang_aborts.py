"""Requests that end early, and their pages: SGLang frees the pages when no writer is left, and not before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helpers import DECODE, new_prompt, wait_until
from sglangqueues import Pair

from kvroom.core.phases import KVPoll

ABORTED = "SGLang aborted the request, as it does when the client disconnects"
QUICK = {"bootstrap_s": 1, "drain_s": 0.5}


@pytest.fixture
def two() -> Iterator[Pair]:
    """Return a pair whose decode side, as with one-sided engines, cannot prevent late writes."""
    with Pair(QUICK) as pair:
        pair.decode.faults.proof = False
        yield pair


# -- the prefill side gives up -----------------------------------------------------------------------------------------


def no_decode_side(pair: Pair) -> tuple[Any, Any]:
    source, _ = pair.requests(new_prompt(60))
    pair.prefill.begin(source)
    return source, None


def linked(pair: Pair) -> tuple[Any, Any]:
    source, sink = pair.requests(new_prompt(60))
    pair.prefill.begin(source)
    one = pair.decode.begin(sink)
    wait_until(lambda: pair.decode.linked(one), "the links")
    return source, one


def offered(pair: Pair) -> tuple[Any, Any]:
    source, sink = pair.requests(new_prompt(60))
    pair.prefill.begin(source)
    one = pair.decode.begin(sink)
    pair.decode.offer(one)
    pair.prefill.ready(source)
    return source, one


def one_chunk_sent(pair: Pair) -> tuple[Any, Any]:
    source, one = offered(pair)
    pair.prefill.send(source, 32)
    return source, one


def in_flight(pair: Pair) -> tuple[Any, Any]:
    source, one = offered(pair)
    pair.prefill.faults.hold()
    pair.prefill.send(source)
    pair.prefill.faults.wait_held(1)
    return source, one


STAGES = [no_decode_side, linked, offered, one_chunk_sent, in_flight]


@pytest.mark.parametrize("stage", STAGES)
def test_a_sender_that_is_aborted_and_forgotten_leaves_nothing(two: Pair, stage: Any) -> None:
    """On three paths SGLang calls `abort`, and after that neither `poll` nor `clear` nor any other method."""
    source, one = stage(two)
    source.disagg_kv_sender.abort()
    if source.metadata_buffer_index >= 0:
        two.prefill.rows.free(source.metadata_buffer_index)
    if one is not None:
        assert ABORTED in two.decode.failed(one)
    two.prefill.faults.release()
    if one is not None and stage is not linked:
        two.decode.wait_released(one.req)
    two.wait_idle()
    assert source.disagg_kv_sender.poll() is KVPoll.Failed
    if one is not None:
        two.hand_over(new_prompt(50), room=source.bootstrap_room)


@pytest.mark.parametrize("stage", STAGES)
def test_a_sender_that_is_aborted_in_a_queue_fails_there(two: Pair, stage: Any) -> None:
    source, one = stage(two)
    source.disagg_kv_sender.abort()
    source.disagg_kv_sender.abort()
    assert source.disagg_kv_sender.poll() is KVPoll.Failed
    assert ABORTED in two.prefill.give_up(source).failure_reason
    if one is not None:
        assert ABORTED in two.decode.failed(one)
        two.prefill.faults.release()
        if stage is not linked:
            two.decode.wait_released(one.req)
    two.wait_idle()


def test_an_abort_after_success_changes_nothing(two: Pair) -> None:
    source, one = offered(two)
    two.prefill.send(source)
    wait_until(lambda: source.disagg_kv_sender.poll() is KVPoll.Success, "success")
    source.disagg_kv_sender.abort()
    assert source.disagg_kv_sender.poll() is KVPoll.Success
    assert source.disagg_kv_sender.get_transfer_metric().transfer_total_bytes
    assert two.decode.finish(one) == 11
    assert two.decode.wrong_tokens(one.req) == []
    two.prefill.rows.free(source.metadata_buffer_index)
    two.wait_idle()


def test_calls_after_the_end_do_nothing(two: Pair) -> None:
    source, one = offered(two)
    sender, receiver = source.disagg_kv_sender, one.kv_receiver
    sender.abort()
    two.prefill.send(source)
    two.decode.failed(one)
    receiver.send_metadata(two.decode.slots(one.req, 0, 60)[::16] // 16, 0, [], 0)
    for side in (sender, receiver):
        side.abort()
        side.clear()
        side.clear()
        assert side.poll() is KVPoll.Failed
    two.prefill.rows.free(source.metadata_buffer_index)
    two.decode.wait_released(one.req)
    two.wait_idle()


# -- the decode side gives up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [linked, offered, one_chunk_sent, in_flight])
def test_a_receiver_that_is_aborted_ends_both_sides(two: Pair, stage: Any) -> None:
    source, one = stage(two)
    sender, receiver = source.disagg_kv_sender, one.kv_receiver
    receiver.abort()
    assert receiver.poll() is KVPoll.Failed
    assert ABORTED in two.decode.failed(one)
    wait_until(lambda: sender.poll() is KVPoll.Failed, "the failure of the sender")
    two.prefill.faults.release()
    assert ABORTED in two.prefill.give_up(source).failure_reason
    if stage is not linked:
        two.decode.wait_released(one.req)
    two.wait_idle()


def test_a_receiver_that_is_aborted_before_its_links_are_up_ends(two: Pair) -> None:
    _, sink = two.requests(new_prompt(60))
    one = two.decode.begin(sink)
    one.kv_receiver.abort()
    assert one.kv_receiver.conclude_state is KVPoll.Failed
    assert ABORTED in two.decode.failed(one)
    two.wait_idle()


def test_a_receiver_without_its_prefill_side_fails_by_itself(two: Pair) -> None:
    _, sink = two.requests(new_prompt(60))
    sink.bootstrap_port = two.decode.port = 1  # where no directory is
    one = two.decode.begin(sink)
    assert "127.0.0.1:1" in two.decode.failed(one)
    two.wait_idle()


def test_a_sender_without_its_decode_side_fails_by_itself(two: Pair) -> None:
    source, _ = no_decode_side(two)
    wait_until(lambda: source.disagg_kv_sender.poll() is KVPoll.Failed, "the deadline of the sender")
    assert "for a decode worker to offer pages" in two.prefill.give_up(source).failure_reason
    two.wait_idle()


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_are_held_until_the_last_write_is_over_past_any_deadline(
    two: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, one = in_flight(two)
    receiver = one.kv_receiver
    receiver.abort()
    two.decode.failed(one)
    assert two.decode.transfers.num_pending_deferred_releases() == 1
    row = one.metadata_buffer_index
    begin = time.monotonic()
    monkeypatch.setattr(DECODE, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600, time=time.time))
    quarantined = two.decode.manager.manager.audit
    wait_until(lambda: quarantined().quarantined == 1, "the quarantine")
    for _ in range(50):
        assert not two.decode.released(one.req)
    assert time.monotonic() - begin < 30  # the hour is SGLang's
    assert row not in two.decode.rows.free_slots
    assert (
        two.decode.manager.is_abort_release_safe(one.req.bootstrap_room, 1) is receiver.is_abort_release_safe() is False
    )
    assert two.decode.manager.counts() == {"held": 1}
    two.prefill.faults.release()
    two.decode.wait_released(one.req)
    assert receiver.is_abort_release_safe()
    assert row in two.decode.rows.free_slots
    before = two.decode.pages()
    two.prefill.give_up(source)
    two.wait_idle()
    assert two.decode.pages() == before


def test_without_the_hook_sglang_releases_pages_that_are_still_written(
    two: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang by itself frees the pages after its deadline. This shows that the test above can fail."""
    source, one = in_flight(two)
    queue = type(two.decode.transfers)
    monkeypatch.setattr(queue, "_defer_release", queue._defer_release.__wrapped__)
    one.kv_receiver.abort()
    two.decode.failed(one)
    monkeypatch.setattr(DECODE, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600, time=time.time))
    assert two.decode.released(one.req)
    assert two.prefill.faults.held == 1
    two.prefill.faults.release()
    two.prefill.give_up(source)
    for side in (two.prefill, two.decode):
        side.wait_idle()


def test_a_room_number_that_fails_twice_is_released_twice(two: Pair) -> None:
    number = None
    for _ in range(2):
        source, sink = two.requests(new_prompt(60), room=number)
        number = source.bootstrap_room
        two.prefill.begin(source)
        one = two.decode.begin(sink)
        two.decode.offer(one)
        two.prefill.ready(source)
        two.prefill.faults.hold()
        two.prefill.send(source)
        two.prefill.faults.wait_held(1)
        one.kv_receiver.abort()
        two.decode.failed(one)
        assert not two.decode.released(sink)
        two.prefill_fails(source)
        two.prefill.faults.release()
        two.decode.wait_released(sink)
        two.wait_idle()
    two.hand_over(new_prompt(60), room=number)
    two.wait_idle()


def test_pages_of_one_number_wait_for_every_request_that_had_it(two: Pair) -> None:
    manager: Any = two.decode.manager
    first, second, other = (SimpleNamespace(bootstrap_room=room, released=False) for room in (7, 7, 8))
    for receiver in (first, second, other):
        manager.hold(receiver)
    assert manager.counts() == {"held": 3}
    first.released = True
    assert not manager.is_abort_release_safe(7, 1)
    manager.clear_deferred_abort_state(7)
    assert manager.counts() == {"held": 2}
    second.released = True
    assert manager.is_abort_release_safe(7, 1)
    assert not manager.is_abort_release_safe(8, 1)
    assert manager.is_abort_release_safe(9, 1)
    manager.clear_deferred_abort_state(7)
    manager.clear_deferred_abort_state(9)
    assert manager.counts() == {"held": 1}


def test_pages_that_were_never_offered_are_free(two: Pair) -> None:
    _, sink = two.requests(new_prompt(60))
    one = two.decode.begin(sink)
    receiver = one.kv_receiver
    assert receiver.released
    receiver.abort()
    assert receiver.is_abort_release_safe()
    two.decode.failed(one)
    two.wait_idle()


def test_a_prompt_that_cannot_be_prefilled_again_fails_its_request(two: Pair) -> None:
    source, one = offered(two)
    two.decode.manager.submit_prefill_recompute(one.kv_receiver, {})
    assert "which kvroom does not support: send the request again" in two.decode.failed(one)
    two.prefill_fails(source)
    two.decode.wait_released(one.req)
    two.wait_idle()


def test_pages_in_host_memory_are_refused(two: Pair) -> None:
    source, sink = two.requests(new_prompt(60))
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    wait_until(lambda: two.decode.linked(one), "the links")
    one.kv_receiver.identify(sink, None)
    destination = DECODE.KVTransferDestination.HOST
    one.kv_receiver.send_metadata(two.decode.slots(sink, 0, 60)[::16] // 16, 0, [], 0, destination=destination)
    assert "pages in host memory, which kvroom does not support" in two.decode.failed(one)
    assert "pages in host memory" in str(two.prefill_fails(source))
    two.wait_idle()


def test_an_offer_without_the_hook_fails_the_request(two: Pair) -> None:
    source, sink = two.requests(new_prompt(60))
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    wait_until(lambda: two.decode.linked(one), "the links")
    one.kv_receiver.send_metadata(two.decode.slots(sink, 0, 60)[::16] // 16, 0, [], 0)
    assert "the length of the prompt is unknown: SGLang did not call kvroom's hook for the offer" in two.decode.failed(
        one
    )
    assert "hook for the offer" in str(two.prefill_fails(source))
    two.wait_idle()


def test_pages_that_do_not_fit_the_prompt_fail_the_request(two: Pair) -> None:
    source, sink = two.requests(new_prompt(60))
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    wait_until(lambda: two.decode.linked(one), "the links")
    one.kv_receiver.identify(sink, None)
    one.kv_receiver.send_metadata(two.decode.slots(sink, 0, 33)[::16] // 16, 0, [], 0)
    assert "pages" in two.decode.failed(one)
    assert "pages" in str(two.prefill_fails(source))
    two.wait_idle()

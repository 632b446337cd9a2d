"""Requests through SGLang's own queues, from the creation of senders and receivers to the content of the pages."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch
from sglang_helpers import new_prompt, new_request, row_of, wait_until
from sglangqueues import Decode, Pair, failure

from kvroom.adapters.sglang import sender as senders
from kvroom.adapters.sglang.receiver import KVRoomKVReceiver
from kvroom.adapters.sglang.rows import Rows
from kvroom.adapters.sglang.sender import KVRoomKVSender
from kvroom.core.phases import KVPoll

NO_ROOMS = [0, -1, 2**63, 2**64, "x", "7", True, None, 1.0, [7]]


@pytest.fixture
def two() -> Iterator[Pair]:
    """Return a pair whose transport is `memory`."""
    with Pair() as pair:
        yield pair


def slots_left_alone(side: Decode, req: Any) -> list[torch.Tensor]:
    """Return the bytes of all slots that do not belong to the request."""
    own = set(side.slots(req, 0, len(req.origin_input_ids)).tolist())
    others = torch.tensor([slot for slot in range(side.pool.size + side.page_size) if slot not in own])
    buffers = [buffer for layer in range(side.pool.layer_num) for buffer in side.pool.get_kv_buffer(layer)]
    return [buffer[others].view(torch.uint8).clone() for buffer in buffers]


def concluded(receiver: KVRoomKVReceiver) -> object:
    return receiver.conclude_state


# -- requests that succeed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefill_page", "decode_page"),
    [(1, 1), (16, 16), (64, 64), (1, 16), (16, 1), (1, 64), (64, 1), (16, 64), (64, 16)],
)
def test_page_sizes_chunks_and_prefixes(prefill_page: int, decode_page: int) -> None:
    options: dict[str, Any] = {"prefill_page_size": prefill_page, "decode_page_size": decode_page}
    with Pair(prefill_pages=4096 // prefill_page, decode_pages=4096 // decode_page, **options) as pair:
        for length in (1, 2, 63, 64, 65, 200, 256):
            prefixes = {0, decode_page, 3 * decode_page, length - length % decode_page}
            for prefix in sorted(prefix for prefix in prefixes if prefix <= length):
                for stops in ((), (64, 130), (length - 1,)):
                    prompt = new_prompt(length, seed=prefix)
                    pair.hand_over(prompt, *(stop for stop in stops if prefix < stop < length), prefix=prefix)
                    pair.prefill.free_all()
                    pair.decode.free_all()
        pair.wait_idle()


@pytest.mark.parametrize("transport", ["tcp", "local", "auto"])
def test_transports_between_real_links(transport: str) -> None:
    with Pair({"transport": transport, "checksum": 1}, layers=3) as pair:
        for length in (1, 100, 300):
            pair.hand_over(new_prompt(length), *(stop for stop in (64,) if stop < length))
        pair.wait_idle()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_dtypes(dtype: torch.dtype) -> None:
    with Pair(dtype=dtype) as pair:
        pair.hand_over(new_prompt(100), 32, prefix=16)
        pair.wait_idle()


def test_nothing_but_the_slots_of_the_request_is_written(two: Pair) -> None:
    source, sink = two.requests(new_prompt(70))
    two.decode.compute(new_request(new_prompt(200, seed=9)), 0, 200)
    before = slots_left_alone(two.decode, sink)
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.run(source)
    two.decode.finish(one)
    assert two.decode.wrong_tokens(sink) == []
    assert all(map(torch.equal, slots_left_alone(two.decode, sink), before))


def test_requests_that_overlap_keep_their_own(two: Pair) -> None:
    pairs = [two.requests(new_prompt(40 + 9 * number, seed=number)) for number in range(6)]
    ones = []
    for number, (source, sink) in enumerate(pairs):  # either side may be the first
        if number % 2:
            two.prefill.begin(source)
        ones.append(two.decode.begin(sink))
        if not number % 2:
            two.prefill.begin(source)
    for one in reversed(ones):
        two.decode.offer(one)
    for source, _ in pairs:
        two.prefill.ready(source)
    for stop in (16, 32):
        for source, _ in pairs:
            two.prefill.send(source, stop)
    for number, (source, _) in enumerate(reversed(pairs)):
        two.prefill.send(source, first_token=100 + number)
    for number, (source, sink) in enumerate(reversed(pairs)):
        two.prefill.finish(source)
        assert two.decode.finish(ones[len(pairs) - 1 - number]) == 100 + number
        assert two.decode.wrong_tokens(sink) == []


def test_the_row_and_the_metric_arrive(two: Pair) -> None:
    source, sink = two.requests(new_prompt(70), return_logprob=True, top_logprobs_num=3)
    source.logprob.output_token_logprobs_val, source.logprob.output_token_logprobs_idx = [-0.25], [4711]
    source.logprob.output_top_logprobs_val = [[-0.25, -1.5, -2.0]]
    source.logprob.output_top_logprobs_idx = [[4711, 5, 6]]
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    two.decode.offer(one, prefix=16)
    row = one.metadata_buffer_index
    metric = two.prefill.run(source, first_token=4711, cached=48)
    assert two.decode.finish(one) == 4711
    assert sink.cached_tokens == 48
    assert sink.logprob.output_token_logprobs_val == [-0.25]
    assert sink.logprob.output_top_logprobs_val == [[-0.25, -1.5, -2.0]]
    assert sink.logprob.output_top_logprobs_idx == [[4711, 5, 6]]
    sent, taken = row_of(two.prefill.buffers, source.metadata_buffer_index), row_of(two.decode.buffers, row)
    assert taken[:-1] == sent[:-1]  # SGLang has cleared the last one, the room number
    assert metric.transfer_total_bytes == (70 - 16) * 4 * 2 * 8 * 2  # tokens, buffers, heads, head size, bytes
    assert metric.transfer_latency_s > 0


def test_a_metric_without_a_transfer_has_no_numbers(two: Pair) -> None:
    source, sink = two.requests(new_prompt(20))
    sender = two.prefill.begin(source)
    for metric in (sender.get_transfer_metric(), KVRoomKVSender(two.prefill.manager, "", 0).get_transfer_metric()):
        assert (metric.transfer_latency_s, metric.transfer_total_bytes) == (None, None)
    one = two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.run(source)
    two.decode.finish(one)


def test_a_metric_is_asked_for_in_the_moment_of_success(two: Pair) -> None:
    """The scheduler's thread may see `Success` before the manager's thread has woken the callers of `wait`."""
    source, sink = two.requests(new_prompt(20))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.run(source)
    two.decode.finish(one)
    assert sender.get_transfer_metric().transfer_total_bytes
    assert sender.leg.handle is not None
    sender.leg.handle._ended = Future()
    assert sender.get_transfer_metric().transfer_total_bytes


# -- the status for the queues -----------------------------------------------------------------------------------------


def test_statuses_are_those_that_each_queue_expects() -> None:
    with Pair() as pair:
        source, sink = pair.requests(new_prompt(60))
        pair.prefill.faults.hold()
        sender = pair.prefill.begin(source)
        assert sender.poll() is KVPoll.Bootstrapping
        receiver = KVRoomKVReceiver(pair.decode.manager, pair.address, sink.bootstrap_room)
        handle = receiver.leg.handle
        assert handle is not None
        wait_until(lambda: handle.poll() is KVPoll.WaitingForInput, "the links")
        assert receiver.poll() is KVPoll.Bootstrapping  # SGLang has not called `init`
        receiver.init(0)
        assert receiver.poll() is KVPoll.WaitingForInput
        assert concluded(receiver) is None
        assert sender.poll() is KVPoll.Bootstrapping  # SGLang must not prefill before the decode side has pages
        receiver.identify(sink, None)
        row = pair.decode.rows.alloc()
        receiver.send_metadata(pair.decode.slots(sink, 0, 60)[::16] // 16, row, [], 0)
        pair.prefill.ready(source)
        assert sender.poll() is sender.poll_pp_consensus() is KVPoll.WaitingForInput
        pair.prefill.send(source)
        pair.prefill.faults.wait_held(1)
        wait_until(lambda: sender.poll() is KVPoll.Transferring, "the transfer")
        assert receiver.poll() in (KVPoll.WaitingForInput, KVPoll.Transferring)
        assert pair.decode.buffers.bootstrap_room[row, 0] == 0
        pair.prefill.faults.release()
        wait_until(lambda: receiver.poll() is KVPoll.Success, "success")
        assert concluded(receiver) is KVPoll.Success
        assert int(pair.decode.buffers.bootstrap_room[row, 0]) == sink.bootstrap_room
        pair.prefill.finish(source)
        for _ in range(2):
            receiver.clear()
            sender.clear()
        pair.decode.rows.free(row)
        pair.wait_idle()


def test_the_row_is_written_once(two: Pair) -> None:
    source, sink = two.requests(new_prompt(20))
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    two.decode.offer(one)
    receiver, row = one.kv_receiver, one.metadata_buffer_index
    two.prefill.run(source)
    wait_until(lambda: receiver.poll() is KVPoll.Success, "success")
    two.decode.buffers.output_ids[row, 0] = 99
    assert receiver.poll() is KVPoll.Success
    assert two.decode.finish(one) == 99


# -- requests that cannot succeed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", NO_ROOMS)
def test_a_wrong_room_number_fails_the_request_and_raises_nothing(two: Pair, room: Any) -> None:
    source, sink = new_request(new_prompt(5)), new_request(new_prompt(5))
    source.bootstrap_room = sink.bootstrap_room = room
    for side in (two.prefill.begin(source), two.decode.begin(sink).kv_receiver):
        side.identify(source, None)
        assert side.poll() is KVPoll.Failed
        error = failure(side)
        assert "invalid bootstrap_room: give an int of at least 1 and below 2**63" in error.failure_reason
        assert not error.is_from_another_rank
        side.abort()
        side.clear()
    assert two.decode.failed(two.decode.queue.queue[-1]).startswith("Decode handshake failed")
    assert two.prefill.leftovers() == two.decode.leftovers() == {}


def test_a_room_in_use_is_refused_and_goes_on(two: Pair) -> None:
    source, sink = two.requests(new_prompt(40))
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    second, third = two.requests(new_prompt(40), room=source.bootstrap_room)
    late = two.prefill.begin(second)
    wait_until(lambda: late.poll() is KVPoll.Failed, "the refusal of the second sender")
    assert f"room {source.bootstrap_room}" in two.prefill.give_up(second).failure_reason
    assert "is already open on the prefill side" in failure(late).failure_reason
    assert "is already open on the decode side" in two.decode.failed(two.decode.begin(third))
    two.decode.offer(one)
    two.prefill.run(source)
    two.decode.finish(one)
    assert two.decode.wrong_tokens(sink) == []


def test_a_closed_manager_fails_requests_and_raises_nothing() -> None:
    with Pair() as pair:
        source, sink = pair.requests(new_prompt(5))
        sender, one = pair.prefill.begin(source), pair.decode.begin(sink)
        receiver = one.kv_receiver
        # The decode side is closed first, because its room would also end with the link to the prefill side.
        pair.decode.manager.close()
        pair.prefill.manager.close()
        late_source, late_sink = pair.requests(new_prompt(5))
        for side in (sender, receiver, pair.prefill.begin(late_source), pair.decode.begin(late_sink).kv_receiver):
            side.identify(source, None)
            assert side.poll() is KVPoll.Failed
            assert "closed" in failure(side).failure_reason
            side.abort()
            side.clear()


def test_a_failure_of_another_rank_ends_the_room(two: Pair) -> None:
    source, sink = two.requests(new_prompt(40))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.ready(source)
    error = two.prefill.give_up(source)
    assert (error.is_from_another_rank, error.failure_reason) == (
        True,
        f"room {source.bootstrap_room}: another rank of this server has failed the request",
    )
    assert sender.poll() is KVPoll.Failed
    assert "another rank of this server has failed the request" in two.decode.failed(one)
    two.wait_idle()


def test_a_failure_of_another_decode_rank_ends_the_room(two: Pair) -> None:
    source, sink = two.requests(new_prompt(40))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.ready(source)
    assert failure(one.kv_receiver).is_from_another_rank
    two.decode.failed(one)
    wait_until(lambda: sender.poll() is KVPoll.Failed, "the end of the sender's room")
    error = two.prefill.give_up(source)
    assert not error.is_from_another_rank
    assert "another rank of this server has failed the request" in error.failure_reason
    two.decode.wait_released(sink)
    two.wait_idle()


def first_token(token: int, two: Pair, source: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"first_token": token}


def garbage(two: Pair, source: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(senders, "encode_aux", lambda aux: b"\xc1garbage")
    return {}


def no_row(two: Pair, source: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(Rows, "read", lambda self, row: {"vllm.kv.1": b"x"})
    return {}


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (partial(first_token, 49152), r"sent 49152 as first token, outside [0, 49152)"),
        (partial(first_token, 2**31 - 1), r"as first token, outside [0, 49152)"),
        (partial(first_token, -1), "the prefill side sent no first token"),
        (garbage, "the prefill side sent 8 bytes of aux that are not an aux message"),
        (no_row, "sent vllm.kv.1 instead of sglang.metadata.1: SGLang can only continue"),
    ],
)
def test_invalid_metadata_of_a_prefill_side(
    two: Pair, monkeypatch: pytest.MonkeyPatch, happens: Any, words: str
) -> None:
    source, sink = two.requests(new_prompt(40))
    said = happens(two, source, monkeypatch)
    two.prefill.begin(source)
    one = two.decode.begin(sink)
    two.decode.offer(one)
    before = row_of(two.decode.buffers, one.metadata_buffer_index)
    two.prefill.ready(source)
    two.prefill.send(source, **said)
    row = one.metadata_buffer_index
    two.decode.failed(one)
    assert row_of(two.decode.buffers, row) == before
    assert words in sink.finished_reason.message
    two.decode.wait_released(sink)
    wait_until(lambda: source.disagg_kv_sender.poll() in (KVPoll.Success, KVPoll.Failed), "the end of the sender")
    two.prefill.give_up(source)
    two.wait_idle()


def other_token(sink: Any) -> None:
    sink.origin_input_ids = array("q", [*sink.origin_input_ids[:-1], sink.origin_input_ids[-1] + 1])


def other_length(sink: Any) -> None:
    sink.origin_input_ids = sink.origin_input_ids[:33]


def other_salt(sink: Any) -> None:
    sink.cache_salt = "another tenant"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_token, r"tokens is 40 ids on the prefill side and another \(40 ids\) on the decode side"),
        (other_length, r"tokens is 40 ids on the prefill side and 33 ids on the decode side"),
        (other_salt, r"cache_salt is none on the prefill side and set on the decode side"),
    ],
)
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_different_requests_fail_both_sides_before_anything_is_sent(
    two: Pair, change: Callable[[Any], None], words: str, first: str
) -> None:
    source, sink = two.requests(new_prompt(40))
    change(sink)
    if first == "prefill":
        sender = two.prefill.begin(source)
    one = two.decode.begin(sink)
    two.decode.offer(one)
    if first == "decode":
        sender = two.prefill.begin(source)
    wait_until(lambda: sender.poll() is KVPoll.Failed, "the failure of the sender")
    said = two.prefill.give_up(source).failure_reason
    assert re.search(words, said)
    assert said in two.decode.failed(one)
    two.decode.wait_released(sink)
    two.wait_idle()

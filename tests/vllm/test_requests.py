"""Single events between two engines without a model, handled by vLLM's scheduler and the connector."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from schedulers import BLOCK, Engine, prompt, run

from kvroom import PlanError, Timeouts

IN_TURN = {"do_remote_decode": True}
LONG = Timeouts(bootstrap_s=60, waiting_s=60, stall_s=60, drain_s=1, renew_s=0.2)
ROOM = 7
Start = Callable[..., Engine]


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    """Return a function that starts engines over the transport `memory`, whose writes can be held back.

    The transport proves no drain.
    """
    engines: list[Engine] = []

    def make(role: str, **options: Any) -> Engine:
        engine = Engine(role, model, **{"transport": "memory", "timeouts": LONG, "policy": "recompute", **options})
        engine.faults.proof = False
        engines.append(engine)
        return engine

    yield make
    for engine in reversed(engines):
        engine.close()
        assert engine.mistakes.found == []


def finish(*engines: Engine) -> None:
    """Step until no engine keeps anything."""
    run(list(engines), lambda: not any(engine.busy or engine.leftovers() for engine in engines))


def loading(prefill: Engine, decode: Engine) -> tuple[str, list[int]]:
    """Begin a load whose writes are held back. Return the decode request and its prompt."""
    tokens = prompt(Random(1), 5 * BLOCK)
    prefill.faults.hold()
    name = prefill.add(tokens, {**prefill.at, "bootstrap_room": ROOM})
    request = decode.add(tokens, {**prefill.at, "bootstrap_room": ROOM}, max_tokens=3)
    run([prefill, decode], lambda: name in prefill.ended and prefill.faults.held > 0)
    return request, tokens


def first_chunk(prefill: Engine, decode: Engine) -> tuple[str, str]:
    """Begin a prompt of three chunks, with the write of the first one held back. Return both requests."""
    tokens = prompt(Random(1), 6 * BLOCK)
    params = {**prefill.at, "bootstrap_room": ROOM}
    request = decode.add(tokens, params, max_tokens=3)
    run([decode], lambda: any(room.phase == "OFFERED" for room in decode.manager.rooms()))
    prefill.faults.hold()
    name = prefill.add(tokens, params)
    prefill.step()
    prefill.faults.wait_held(1, timeout_s=30)
    return name, request


def test_chunks_are_sent_while_later_ones_are_computed(start: Start) -> None:
    prefill, decode = start("prefill", batched_tokens=2 * BLOCK), start("decode")
    name, request = first_chunk(prefill, decode)
    assert name not in prefill.ended
    prefill.faults.release()
    finish(prefill, decode)
    assert decode.ended[request].tokens == 3


def test_a_prefix_that_the_decode_side_has_is_not_moved(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode")
    tokens = prompt(Random(1), 6 * BLOCK)
    for length in (4 * BLOCK, 6 * BLOCK):
        name = prefill.add(tokens[:length], IN_TURN)
        run([prefill], lambda name=name: name in prefill.ended)  # type: ignore[misc]
        decode.add(tokens[:length], prefill.ended[name].params, max_tokens=3)
        finish(prefill, decode)
    assert decode.side.tokens_loaded == 6 * BLOCK


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_blocks_that_may_still_be_written_stay_with_a_request_whose_client_has_left(
    start: Start, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = start("prefill"), start("decode", policy=policy)
    request, tokens = loading(prefill, decode)
    decode.abort(request)
    other = decode.add(prompt(Random(2), 3 * BLOCK), None, max_tokens=20)
    run([decode], lambda: other in decode.ended)
    assert decode.held_blocks == len(tokens) // BLOCK
    prefill.faults.release()
    finish(prefill, decode)
    assert "cannot be loaded" not in caplog.text  # no client waits for it


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_failure_is_reported_before_the_blocks_are_free(start: Start, policy: str) -> None:
    prefill = start("prefill", timeouts=LONG)
    decode = start("decode", policy=policy, timeouts=Timeouts(bootstrap_s=60, stall_s=1, waiting_s=1, drain_s=1))
    request, tokens = loading(prefill, decode)
    if policy == "fail":
        run([decode], lambda: request in decode.ended)
        assert decode.ended[request].reason == "error"
        assert decode.held_blocks == len(tokens) // BLOCK
    else:
        run([decode], lambda: decode.side._loading[request].reported)
        assert request not in decode.ended
    prefill.faults.release()
    finish(prefill, decode)
    if policy == "recompute":
        assert decode.ended[request].tokens == 3
        assert "timed out after 1 s (" in decode.ended[request].params["failure"]


def test_blocks_that_may_still_be_read_stay_with_a_prefill_request_whose_client_has_left(start: Start) -> None:
    prefill, decode = start("prefill", batched_tokens=2 * BLOCK), start("decode")
    name, request = first_chunk(prefill, decode)
    prefill.abort(name)
    other = prefill.add(prompt(Random(2), 3 * BLOCK), None, max_tokens=20)
    run([prefill], lambda: other in prefill.ended)
    assert prefill.held_blocks > 0
    prefill.faults.release()
    finish(prefill, decode)
    assert "before its KV cache was complete: aborted" in decode.ended[request].params["failure"]
    assert decode.ended[request].tokens == 3


@pytest.mark.parametrize(("tokens", "loaded"), [(1, 0), (2, 1), (16, 15), (35, 34), (55, 39), (112, 103), (120, 119)])
@pytest.mark.parametrize("way", ["in turn", "at once"])
def test_a_sliding_window_is_handed_over(start: Start, tokens: int, loaded: int, way: str) -> None:
    """With a window of 40 and blocks of 16, the 39 tokens before the next one are moved, from the start of a block."""
    prefill, decode = (start(role, window=40, blocks=80, policy="fail") for role in ("prefill", "decode"))
    asked = prompt(Random(tokens), tokens)
    params = IN_TURN if way == "in turn" else {**prefill.at, "bootstrap_room": ROOM}
    name = prefill.add(asked, params)
    run([prefill], lambda: name in prefill.ended)
    request = decode.add(asked, prefill.ended[name].params if way == "in turn" else params, max_tokens=60)
    finish(prefill, decode)
    assert decode.ended[request].tokens == 60
    assert decode.side.tokens_loaded == loaded


def test_a_window_is_not_written_over_blocks_that_others_read(start: Start) -> None:
    """The producer has another prompt, and its writes must not get into the prefix that the consumer has cached."""
    prefill, decode = start("prefill", window=40), start("decode", window=40)
    known = prompt(Random(1), 4 * BLOCK)
    params = {**prefill.at, "bootstrap_room": ROOM}
    decode.add(known, None, max_tokens=3)
    finish(decode)
    prefill.add(prompt(Random(2), len(known) + 10), params)
    request = decode.add([*known, *prompt(Random(3), 10)], params, max_tokens=3)
    finish(prefill, decode)
    again = decode.add(known, None, max_tokens=3)
    finish(decode)
    assert decode.ended[request].tokens == decode.ended[again].tokens == 3


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_failed_load_of_several_groups_is_reported_by_request(start: Start, policy: str) -> None:
    prefill, decode = start("prefill", window=40), start("decode", window=40, policy=policy)
    params = {**prefill.at, "bootstrap_room": ROOM}
    prefill.add(prompt(Random(1), 50), params)
    request = decode.add(prompt(Random(2), 50), params, max_tokens=3)
    finish(prefill, decode)
    assert decode.ended[request].reason == ("error" if policy == "fail" else "length")
    assert decode.side.tokens_loaded == 0


def test_a_preempted_prefill_ends_its_room_and_goes_on(start: Start) -> None:
    prefill, decode = start("prefill", batched_tokens=2 * BLOCK), start("decode")
    name, request = first_chunk(prefill, decode)
    prefill.preempt()
    prefill.step()
    prefill.faults.release()
    run([decode], lambda: request in decode.ended)
    assert name not in prefill.ended
    finish(prefill, decode)
    assert "preempted the request" in decode.ended[request].params["failure"]
    assert decode.ended[request].tokens == 3
    assert prefill.ended[name].reason == "length"


def test_a_preempted_prefill_in_turn_is_handed_over_all_the_same(start: Start) -> None:
    prefill, decode = start("prefill", batched_tokens=2 * BLOCK), start("decode", policy="fail")
    tokens = prompt(Random(1), 6 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: prefill.scheduler.requests[name].num_computed_tokens > 0)
    prefill.preempt()
    run([prefill], lambda: name in prefill.ended)
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=3)
    finish(prefill, decode)
    assert decode.ended[request].tokens == 3
    assert decode.side.tokens_loaded == len(tokens)


def test_a_preempted_decode_request_computes_its_prompt_by_itself(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode")
    tokens = prompt(Random(1), 3 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=20)
    run([prefill, decode], lambda: decode.scheduler.requests[request].num_output_tokens > 2)
    decode.preempt()
    finish(prefill, decode)
    assert decode.ended[request].tokens == 20
    assert decode.side.tokens_loaded == len(tokens)


def test_a_request_that_must_not_load_lets_its_room_go(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode")
    tokens = prompt(Random(1), 3 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=3, prompt_logprobs=1)
    finish(prefill, decode)  # long before the lease ends
    assert decode.ended[request].tokens == 3
    assert decode.side.tokens_loaded == 0


def test_a_request_that_leaves_the_queue_lets_its_room_go(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode", sequences=1)
    tokens = prompt(Random(1), 3 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    decode.add(prompt(Random(2), BLOCK), None, max_tokens=200)
    decode.step()
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=3)
    decode.step()
    decode.abort(request)
    run([prefill, decode], lambda: not prefill.busy)  # long before the lease ends
    finish(prefill, decode)


def test_a_queued_request_renews_the_lease(start: Start) -> None:
    short = Timeouts(bootstrap_s=0.5, waiting_s=60, stall_s=60, drain_s=1, renew_s=0.1)
    prefill, decode = start("prefill", timeouts=short), start("decode", sequences=1, policy="fail", timeouts=short)
    tokens = prompt(Random(1), 3 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    long = decode.add(prompt(Random(2), BLOCK), None, max_tokens=400)
    decode.step()
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=3)
    clock = prefill.manager.loop.now
    due = clock() + 3 * short.bootstrap_s
    run([prefill, decode], lambda: clock() > due)
    decode.abort(long)
    finish(prefill, decode)
    assert decode.ended[request].tokens == 3
    assert decode.side.tokens_loaded == len(tokens)


def test_a_prompt_that_no_consumer_takes_is_kept_for_the_lease_only(start: Start) -> None:
    prefill = start("prefill", timeouts=Timeouts(bootstrap_s=0.5))
    prefill.add(prompt(Random(1), 3 * BLOCK), IN_TURN)
    finish(prefill)


def test_a_second_request_for_an_open_room_fails_and_leaves_the_first_alone(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode", policy="fail")
    tokens = prompt(Random(1), 3 * BLOCK)
    params = {**prefill.at, "bootstrap_room": ROOM}
    first, second = decode.add(tokens, params, max_tokens=3), decode.add(tokens, params, max_tokens=3)
    run([decode], lambda: second in decode.ended)
    prefill.add(tokens, params)
    finish(prefill, decode)
    assert decode.ended[second].reason == "error"
    assert decode.ended[first].tokens == 3


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"do_remote_prefill": True}, "has no bootstrap_room"),
        ({"do_remote_prefill": True, "bootstrap_room": -1, "bootstrap_host": "h", "bootstrap_port": 1}, "room is -1"),
        ({"do_remote_prefill": True, "bootstrap_room": [1, 2], "bootstrap_host": "h"}, r"bootstrap_room is \[1, 2\]"),
        ({"bootstrap_room": 1, "bootstrap_port": 1}, "bootstrap_host is None"),
        ({"bootstrap_room": 1, "bootstrap_host": "h", "bootstrap_port": "x"}, "bootstrap_port is 'x'"),
        ({"bootstrap_room": 1, "bootstrap_host": "a b", "bootstrap_port": 1}, "'a b' is not a host"),
        ({"do_remote_prefill": True, "do_remote_decode": True}, "both do_remote_decode and do_remote_prefill"),
    ],
)
def test_parameters_that_make_no_sense_are_a_failed_load(
    start: Start, params: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    decode = start("decode", policy="fail")
    request = decode.add(prompt(Random(1), 20), params, max_tokens=3)
    finish(decode)
    assert decode.ended[request].reason == "error"
    assert re.search(words, caplog.text)


@pytest.mark.parametrize("wrong", [[5, 6], [1, 2, 3, 4, 6]])
def test_another_prompt_than_the_producer_had_is_a_failed_load(start: Start, wrong: list[int]) -> None:
    prefill, decode = start("prefill"), start("decode")
    right = [1, 2, 3, 4, 5]
    name = prefill.add(right, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    request = decode.add(wrong, prefill.ended[name].params, max_tokens=3)
    finish(prefill, decode)  # immediately: the producer is notified
    assert "send both the same request" in decode.ended[request].params["failure"]
    assert decode.side.tokens_loaded == 0


def test_another_prompt_at_once_is_a_failed_load(start: Start) -> None:
    prefill, decode = start("prefill"), start("decode")
    params = {**prefill.at, "bootstrap_room": ROOM}
    prefill.add([1, 2, 3, 4, 5], params)
    request = decode.add([1, 2, 3, 4, 6], params, max_tokens=3)
    finish(prefill, decode)
    assert "send both the same request" in decode.ended[request].params["failure"]
    assert decode.side.tokens_loaded == 0


def refuse(*_: object) -> None:
    raise PlanError("no such blocks")


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("which", ["pages", "main_blocks"])
def test_blocks_that_make_no_sense_are_a_failed_load(
    start: Start, policy: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = start("prefill"), start("decode", policy=policy)
    tokens = prompt(Random(1), 3 * BLOCK)
    name = prefill.add(tokens, IN_TURN)
    run([prefill], lambda: name in prefill.ended)
    monkeypatch.setattr(decode.tables, which, refuse)
    request = decode.add(tokens, prefill.ended[name].params, max_tokens=3)
    finish(prefill, decode)
    assert decode.ended[request].reason == ("error" if policy == "fail" else "length")
    assert decode.side.tokens_loaded == 0
    if policy == "recompute":
        assert decode.ended[request].params["failure"] == "no such blocks"


def test_blocks_that_cannot_be_sent_end_the_room_and_not_the_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = start("prefill"), start("decode")
    monkeypatch.setattr(prefill.tables, "pages", refuse)
    tokens = prompt(Random(1), 3 * BLOCK)
    params = {**prefill.at, "bootstrap_room": ROOM}
    request, name = decode.add(tokens, params, max_tokens=3), prefill.add(tokens, params)
    finish(prefill, decode)
    assert prefill.ended[name].reason == "length"
    assert "no such blocks" in decode.ended[request].params["failure"]


def test_blocks_that_cannot_be_sent_in_turn_leave_nothing_behind(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = start("prefill")
    monkeypatch.setattr(prefill.tables, "pages", refuse)
    name = prefill.add(prompt(Random(1), 3 * BLOCK), IN_TURN)
    finish(prefill)
    assert prefill.ended[name].params == {"failure": "no such blocks"}


def test_engines_of_both_roles_hand_over_either_way(start: Start) -> None:
    one, other = start("both"), start("both")
    for prefill, decode in ((one, other), (other, one)):
        tokens = prompt(Random(1), 3 * BLOCK + prefill.side.tokens_sent)
        name = prefill.add(tokens, IN_TURN)
        run([prefill], lambda name=name, prefill=prefill: name in prefill.ended)  # type: ignore[misc]
        request = decode.add(tokens, prefill.ended[name].params, max_tokens=3)
        finish(one, other)
        assert decode.ended[request].tokens == 3
    assert one.side.tokens_loaded > 0
    assert other.side.tokens_loaded > 0

"""Calls of SGLang's scheduler: each returns immediately, whatever the other side, network or resolver does.

A call that waits would stop all requests of the server. Each call is made several times, and its best time counts: a
busy machine delays some of them, but a call that waits for something is slow each time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang_helpers import HOST, new_prompt, new_request, wait_until
from sglangqueues import Decode, Pair, failure

from kvroom.adapters.sglang.receiver import KVRoomKVReceiver
from kvroom.adapters.sglang.sender import KVRoomKVSender
from kvroom.core.phases import KVPoll

LIMIT_S = 0.005
LEAST, MOST = 5, 24
TOKENS, PAGE = 32768, 16
PAGES = TOKENS // PAGE
OPTIONS: dict[str, Any] = {"page_size": PAGE, "layers": 1, "pages": PAGES + 8}


class Times:
    """The best time of each call."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call, record its duration, and return its result."""
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        self._best[name] = min(time.perf_counter() - begin, self._best.get(name, float("inf")))
        return result

    def tries(self) -> Iterator[int]:
        """Yield the numbers of the tries, until each call was fast once or `MOST` is reached."""
        for number in range(MOST):
            if number < LEAST or self.slow:
                yield number

    @property
    def slow(self) -> dict[str, float]:
        """The calls whose best time is over the limit."""
        return {name: took for name, took in self._best.items() if took >= LIMIT_S}

    @property
    def names(self) -> set[str]:
        return set(self._best)


@contextlib.contextmanager
def silent(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the address of a server that accepts connections and sends nothing, and a check that one was made."""
    came = threading.Event()
    with socket.create_server((HOST, 0)) as server, contextlib.ExitStack() as connections:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.enter_context(server.accept()[0])
                    came.set()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"{HOST}:{server.getsockname()[1]}", came.is_set
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def refusing(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield an address at which no server listens."""
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        yield f"{HOST}:{bound.getsockname()[1]}", lambda: True


@contextlib.contextmanager
def unresolved(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name whose lookups fail, each after a second or when the test ends."""
    asked, over = threading.Event(), threading.Event()

    def resolve(*_: Any, **__: Any) -> Any:
        asked.set()
        over.wait(1)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    patch.setattr(socket, "getaddrinfo", resolve)
    try:
        yield "prefill.invalid:8998", asked.is_set
    finally:
        over.set()


@pytest.mark.parametrize("partner", [silent, refusing, unresolved])
def test_calls_of_the_receiver_and_its_manager(monkeypatch: pytest.MonkeyPatch, partner: Any) -> None:
    times, prompt = Times(), new_prompt(TOKENS)
    with Pair({"bootstrap_allow": "any"}, **OPTIONS) as pair, partner(monkeypatch) as (address, was_asked):
        for number in times.tries():
            take_over(times, pair.decode, address, prompt, aborted=number % 2 == 0)
        wait_until(was_asked, "the question to the partner")
        assert times.slow == {}
        assert {"receiver", "send_metadata", "poll", "abort", "failure_exception", "clear"} <= times.names


def take_over(times: Times, decode: Decode, address: str, prompt: list[int], *, aborted: bool) -> None:
    """Make all calls of one request that never finds its prefill side, up to the release of its pages and room."""
    manager, req = decode.manager, new_request(prompt)
    room = req.bootstrap_room
    times("prefill_info_table.get", manager.prefill_info_table.get, address)
    times("try_ensure_parallel_info", manager.try_ensure_parallel_info, address)
    times("register_to_bootstrap", manager.register_to_bootstrap)
    receiver: KVRoomKVReceiver = times("receiver", KVRoomKVReceiver, manager, address, room)
    times("poll", receiver.poll)
    times("init", receiver.init, 0)
    times("identify", receiver.identify, req, None)
    times("conclude_state", lambda: receiver.conclude_state)
    pages = decode.slots(req, 0, TOKENS)[::PAGE].numpy() // PAGE
    assert len(pages) == PAGES
    row = decode.rows.alloc()
    times("send_metadata", receiver.send_metadata, pages, row, [], 0)
    times("poll", receiver.poll)
    if aborted:
        times("abort", receiver.abort)
    else:
        times("submit_prefill_recompute", manager.submit_prefill_recompute, receiver, {})
    times("poll", receiver.poll)
    times("failure_exception", failure, receiver)
    times("ensure_abort_notified", receiver.ensure_abort_notified, force_arm=True)
    times("is_abort_release_safe", manager.is_abort_release_safe, room, 1)
    times("counts", manager.counts)
    wait_until(lambda: times("is_abort_release_safe", manager.is_abort_release_safe, room, 1), "the release")
    times("clear_deferred_abort_state", manager.clear_deferred_abort_state, room)
    times("clear", receiver.clear)
    decode.rows.free(row)
    decode.free_all()


def test_calls_of_the_sender_without_a_decode_side() -> None:
    times, prompt = Times(), new_prompt(TOKENS)
    with Pair({"bootstrap_s": 60}, **OPTIONS) as pair:
        for number in times.tries():
            req = new_request(prompt)
            sender: KVRoomKVSender = times(
                "sender", KVRoomKVSender, pair.prefill.manager, f"{HOST}:1", req.bootstrap_room
            )
            pages = pair.prefill.slots(req, 0, TOKENS)[::PAGE].numpy() // PAGE
            times("identify", sender.identify, req, None)
            times("poll", sender.poll)
            times("pop_decode_prefix_len", sender.pop_decode_prefix_len)
            times("init", sender.init, PAGES, 3)
            times("should_send_kv_chunk", sender.should_send_kv_chunk, PAGES, True)
            times("send", sender.send, pages[: PAGES // 2], None, TOKENS // 2)
            times("send", sender.send, pages[PAGES // 2 :], [], TOKENS // 2)
            times("poll", sender.poll)
            times("get_transfer_metric", sender.get_transfer_metric)
            if number % 2:
                times("failure_exception", failure, sender)
            times("abort", sender.abort)
            times("clear", sender.clear)
            pair.prefill.free_all()
        assert times.slow == {}
        pair.prefill.wait_idle()


def test_calls_of_a_hand_off_that_succeeds() -> None:
    times, prompt = Times(), new_prompt(TOKENS)
    with Pair({"transport": "tcp"}, **OPTIONS) as pair:
        for _ in times.tries():
            hand_over(times, pair, prompt)
        assert times.slow == {}


def hand_over(times: Times, pair: Pair, prompt: list[int]) -> None:
    """Make all calls of one request that succeeds."""
    source, sink = pair.requests(prompt)
    sender = times("create_sender", pair.prefill.begin, source)
    one = pair.decode.begin(sink)
    receiver = one.kv_receiver
    wait_until(lambda: pair.decode.linked(one), "the links")
    receiver.identify(sink, None)
    row = pair.decode.rows.alloc()
    pages = pair.decode.slots(sink, 0, TOKENS)[::PAGE].numpy() // PAGE
    times("send_metadata", receiver.send_metadata, pages, row, [], 0)
    wait_until(lambda: pair.prefill.bootstrapped(source), "the offer")
    times("finalize_bootstrap", pair.prefill.queue.finalize_bootstrap, source)
    own = pair.prefill.slots(source, 0, TOKENS)[::PAGE].numpy() // PAGE
    times("send", sender.send, own, [], TOKENS)
    wait_until(lambda: times("poll", receiver.poll) == times("poll", sender.poll) == KVPoll.Success, "success")
    times("clear", sender.clear)
    times("get_transfer_metric", sender.get_transfer_metric)
    pair.decode.queue.queue.remove(one)
    times("clear", receiver.clear)
    pair.decode.rows.free(row)
    pair.prefill.rows.free(source.metadata_buffer_index)
    pair.prefill.free_all()
    pair.decode.free_all()

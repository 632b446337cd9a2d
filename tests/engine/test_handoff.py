"""Two engines, two managers, real links and a real transport, one process: tokens, text, pools and audits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvroom.engine.request import GenerationStats, PrefillResult, Request, TokenEvent
from kvroom.errors import InvalidRequest, KVRoomError, LimitExceeded, RemoteProtocolError, RoomFailed, RoomInUse
from kvroom.wire import aux_message
from kvroom.wire.aux_message import Aux

from .pair import Pair
from .tiny import Tiny, prompt, tiny


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny()


@pytest.fixture(scope="module")
def shared(model: Tiny) -> Iterator[Pair]:
    """Yield one pair for the tests that leave it idle. Page sizes differ, and chunks end inside pages."""
    with Pair(model.loaded, prefill={"page_tokens": 4, "chunk_tokens": 7}, decode={"page_tokens": 8}) as pair:
        yield pair


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.check_idle()


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def stats_of(events: list[TokenEvent]) -> GenerationStats:
    assert all(event.finish_reason is None and event.stats is None for event in events[:-1])
    stats = events[-1].stats
    assert stats is not None
    return stats


# -- it works ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_token_equals_transformers(kind: str) -> None:
    model = tiny(kind)
    lengths = [1, 3, 4, 7, 8, 9, 40, 90]
    with Pair(model.loaded, prefill={"page_tokens": 8, "chunk_tokens": 16}, decode={"page_tokens": 8}) as pair:
        requests = [pair.request(prompt(length, seed=length), max_tokens=20) for length in lengths]
        for request, (events, result) in zip(requests, pair.serve(*requests), strict=True):
            expected = model.generate(request.prompt_ids, 20)
            assert [event.token_id for event in events] == expected
            assert result.first_token.token_id == expected[0]
            assert events[-1].finish_reason == ("length" if len(expected) == 20 else "stop")
            assert stats_of(events).prompt_tokens_computed == 0
        assert pair.decode.prompt_tokens_computed == 0
        assert pair.prefill.prompt_tokens_computed == sum(lengths)
        pair.check_idle()


def test_page_sizes_may_differ_and_chunks_may_end_anywhere(pair: Pair, model: Tiny) -> None:
    requests = [pair.request(prompt(length, seed=length), max_tokens=9) for length in (1, 6, 7, 8, 29, 64)]
    for request, (events, result) in zip(requests, pair.serve(*requests), strict=True):
        assert [event.token_id for event in events] == model.generate(request.prompt_ids, 9)
        stats = stats_of(events)
        token_bytes = 2 * 3 * 2 * 8 * 4  # key and value, layers, heads, elements, float32
        assert stats.nbytes == result.nbytes == len(request.prompt_ids) * token_bytes
        assert stats.pages == -(-len(request.prompt_ids) // 8)
        assert result.pages == -(-len(request.prompt_ids) // 4)
        assert (stats.prompt_tokens, stats.completion_tokens) == (len(request.prompt_ids), len(events))
        assert 0 < stats.handoff_s <= stats.ttft_s
        assert stats.transport == result.transport


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_the_transport_does_not_matter(model: Tiny, transport: str) -> None:
    with Pair(model.loaded, transport=transport) as pair:
        request = pair.request(prompt(77), max_tokens=12)
        [(events, result)] = pair.serve(request)
        assert [event.token_id for event in events] == model.generate(request.prompt_ids, 12)
        assert result.transport.startswith(transport)
        pair.check_idle()


def test_more_requests_than_the_pools_hold_take_turns(model: Tiny) -> None:
    small = {"pool_pages": 12, "page_tokens": 4, "chunk_tokens": 8}
    with Pair(model.loaded, prefill=small, decode=small) as pair:
        requests = [pair.request(prompt(9 + seed, seed=seed), max_tokens=10) for seed in range(12)]
        for request, (events, _) in zip(requests, pair.serve(*requests), strict=True):
            assert [event.token_id for event in events] == model.generate(request.prompt_ids, 10)
        pair.check_idle()


def test_a_seed_gives_the_same_tokens_alone_among_others_and_in_one_process(pair: Pair, model: Tiny) -> None:
    def seeded() -> Request:
        return pair.request(prompt(20), max_tokens=24, temperature=0.9, top_k=50, top_p=0.95, seed=5, ignore_eos=True)

    def others() -> list[Request]:
        return [pair.request(prompt(n, seed=n), max_tokens=30, temperature=1.0) for n in (2, 33, 50)]

    [(alone, _)] = pair.serve(seeded())
    among, *_ = pair.serve(seeded(), *others())
    tokens = [event.token_id for event in alone]
    assert [event.token_id for event in among[0]] == tokens
    assert tokens == model.sample(seeded())
    assert tokens != model.sample(pair.request(prompt(20), max_tokens=24))


def test_text_is_the_tokenizers_and_ends_before_a_stop_string(pair: Pair, model: Tiny) -> None:
    [(events, _)] = pair.serve(pair.request(prompt(11), max_tokens=30, ignore_eos=True))
    whole = text_of(events)
    ids = [event.token_id for event in events]
    assert whole == model.loaded.tokenizer.decode(ids, skip_special_tokens=True)
    stop = whole[10:12]
    [(events, _)] = pair.serve(pair.request(prompt(11), max_tokens=30, ignore_eos=True, stop=("never\n", stop)))
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert len(events) < 30


def test_one_token_is_the_prefill_sides_alone(pair: Pair, model: Tiny) -> None:
    [(events, result)] = pair.serve(pair.request(prompt(5), max_tokens=1))
    assert [event.token_id for event in events] == [result.first_token.token_id] == model.generate(prompt(5), 1)
    assert events[0].logprob == result.first_token.logprob


# -- it ends -----------------------------------------------------------------------------------------------------------


def test_leaving_in_the_middle_gives_everything_back(pair: Pair) -> None:
    async def leave(request: Request) -> None:
        prefill = asyncio.ensure_future(pair.prefill.prefill(request))
        events = pair.decode.generate(request)
        assert (await anext(events)).token_id >= 0
        await events.aclose()
        assert isinstance(await prefill, PrefillResult)

    asyncio.run(leave(pair.request(prompt(30), max_tokens=200, ignore_eos=True)))


def test_a_decode_client_that_leaves_ends_the_prefill_that_waits_for_pages(model: Tiny) -> None:
    async def leave(pair: Pair) -> None:
        hog = asyncio.ensure_future(pair.prefill.prefill(pair.request(prompt(60))))  # no decode side ever joins
        request = pair.request(prompt(30), max_tokens=20)
        queued = asyncio.ensure_future(pair.prefill.prefill(request))
        waiting = asyncio.ensure_future(collect(pair, request))
        await pair.offered(request)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(RoomFailed, match="client of the decode worker left"):
            await queued
        hog.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hog

    with Pair(model.loaded, prefill={"pool_pages": 4, "refusal_s": 0.05}) as pair:
        asyncio.run(leave(pair))
        pair.check_idle()


def test_a_prefill_client_that_leaves_ends_the_decode_too(pair: Pair) -> None:
    async def leave(request: Request) -> None:
        prefill = asyncio.ensure_future(pair.prefill.prefill(request))
        await asyncio.sleep(0)  # it has posted the request
        prefill.cancel()
        with pytest.raises(asyncio.CancelledError):
            await prefill
        while pair.prefill.stats().parting == 0:  # the failed room is kept for a decode side that joins later
            await asyncio.sleep(0)
        with pytest.raises(RoomFailed, match="client of the prefill worker left"):
            await collect(pair, request)

    asyncio.run(leave(pair.request(prompt(30), max_tokens=20)))


@pytest.mark.parametrize("early", [True, False])
def test_a_refused_room_tells_the_decode_side_whenever_it_comes(pair: Pair, early: bool) -> None:
    async def refused(request: Request) -> None:
        if early:
            pair.prefill.refuse(request.bootstrap_room, "the body was malformed")
        waiting = asyncio.ensure_future(collect(pair, request))
        if not early:
            await pair.offered(request)
            pair.prefill.refuse(request.bootstrap_room, "the body was malformed")
        with pytest.raises(RoomFailed, match="the body was malformed"):
            await waiting

    asyncio.run(refused(pair.request(prompt(12), max_tokens=5)))


def test_a_room_that_arrives_twice_is_refused_once(pair: Pair, model: Tiny) -> None:
    async def twice(request: Request) -> None:
        first = asyncio.ensure_future(pair.prefill.prefill(request))
        await asyncio.sleep(0)  # it has posted the request
        with pytest.raises(RoomInUse, match=str(request.bootstrap_room)):
            await pair.prefill.prefill(request)
        events = await collect(pair, request)
        assert [event.token_id for event in events] == model.generate(request.prompt_ids, 5)
        await first

    asyncio.run(twice(pair.request(prompt(12), max_tokens=5)))


def test_what_can_never_be_served_is_refused_before_the_room_is_touched(pair: Pair) -> None:
    async def refused(**fields: Any) -> None:
        request = pair.request(**fields)
        with pytest.raises(InvalidRequest):
            await pair.prefill.prefill(request)
        with pytest.raises(InvalidRequest):
            await collect(pair, request)

    asyncio.run(refused(prompt_ids=prompt(250), max_tokens=7))
    asyncio.run(refused(prompt_ids=(), max_tokens=7))
    counters = pair.prefill.manager.counters().opened
    asyncio.run(refused(prompt_ids=prompt(5), max_tokens=0))
    assert pair.prefill.manager.counters().opened == counters


def test_a_request_larger_than_the_pool_names_both_sizes(model: Tiny) -> None:
    with Pair(model.loaded, prefill={"pool_pages": 2}, decode={"pool_pages": 3}) as pair:
        request = pair.request(prompt(33), max_tokens=16)
        with pytest.raises(InvalidRequest, match="needs 3 pages for 33 tokens and the pool has 2"):
            pair.prefill.check(request)
        with pytest.raises(InvalidRequest, match="needs 4 pages for 49 tokens and the pool has 3"):
            pair.decode.check(request)


def test_queues_are_limited_in_length_and_in_time(model: Tiny) -> None:
    tight = {"pool_pages": 4, "max_running": 1, "max_waiting": 1, "queue_s": 0.05}

    async def crowd(pair: Pair) -> None:
        # No prefill side joins: the first request holds its pages, the second waits for pages, the third is refused.
        first = asyncio.ensure_future(collect(pair, pair.request(prompt(40), max_tokens=8)))
        second = asyncio.ensure_future(collect(pair, pair.request(prompt(40), max_tokens=8)))
        await asyncio.sleep(0)  # both have posted their requests
        with pytest.raises(LimitExceeded, match=r"too many open requests \(2, limit 2\)"):
            await collect(pair, pair.request(prompt(40), max_tokens=8))
        with pytest.raises(LimitExceeded, match=r"timed out after 0.05 s \(queue_s\) waiting for free pages"):
            await second
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    # The prefill side gets the refusals, and keeps them for bootstrap_s, for requests that never come.
    with Pair(model.loaded, decode=tight, bootstrap_s=1.0) as pair:
        asyncio.run(crowd(pair))
        pair.check_idle()


def test_aux_bytes_that_are_no_token_fail_the_request_and_not_the_engine(pair: Pair, model: Tiny) -> None:
    async def hand_over(aux: bytes) -> None:
        request = pair.request(prompt(4), max_tokens=5)
        with pair.prefill.manager.sender(request.bootstrap_room, identity=request.identity) as sender:
            sender.send((0,), stop=4, last=True, aux=aux)
            with pytest.raises(RemoteProtocolError, match=r"not an aux message|first token"):
                await collect(pair, request)
            await sender

    asyncio.run(hand_over(b"\xc1"))
    asyncio.run(hand_over(aux_message.encode_aux(Aux(tokens=4))))  # no tokens
    asyncio.run(hand_over(aux_message.encode_aux(Aux(tokens=4, first_token=257))))  # a token beyond the vocabulary
    # At least the last of the prompt's four has to be computed.
    asyncio.run(hand_over(aux_message.encode_aux(Aux(tokens=4, first_token=1, cached_tokens=4))))
    asyncio.run(hand_over(msgspec.msgpack.encode({"version": 1, "tokens": 4, "first_token": 1, "cached_tokens": -1})))
    [(events, _)] = pair.serve(pair.request(prompt(4), max_tokens=3))
    assert [event.token_id for event in events] == model.generate(prompt(4), 3)


def test_closing_ends_every_request_with_a_reason(model: Tiny) -> None:
    async def close(pair: Pair) -> None:
        lonely = asyncio.ensure_future(pair.prefill.prefill(pair.request(prompt(9))))
        unserved = pair.request(prompt(9))
        waiting = asyncio.ensure_future(collect(pair, unserved))
        await pair.offered(unserved)
        await asyncio.to_thread(pair.decode.close)
        await asyncio.to_thread(pair.prefill.close)
        for ended in (lonely, waiting):
            with pytest.raises(KVRoomError, match="takes no more requests: it is closed"):
                await ended
        with pytest.raises(KVRoomError, match="takes no more requests: it is closed"):
            await pair.prefill.prefill(pair.request(prompt(9)))
        pair.prefill.pool.book.check_idle()
        pair.decode.pool.book.check_idle()

    with Pair(model.loaded) as pair:
        asyncio.run(close(pair))


def test_a_fault_in_the_model_ends_every_request_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    broken = tiny(seed=3).loaded

    def burn(*_: object) -> None:
        raise RuntimeError("the device is on fire")

    async def fail(pair: Pair) -> None:
        request = pair.request(prompt(9))
        waiting = asyncio.ensure_future(collect(pair, request))
        await pair.offered(request)
        with pytest.raises(KVRoomError, match="RuntimeError: the device is on fire"):
            await pair.prefill.prefill(request)
        assert "on fire" in str(pair.prefill.stats().error)
        with pytest.raises(RoomFailed, match="on fire"):
            await waiting

    with Pair(broken) as pair:
        broken.model.register_forward_pre_hook(burn)
        asyncio.run(fail(pair))
    assert "the engine's thread stopped: it fails all requests" in caplog.text


async def collect(pair: Pair, request: Request) -> list[TokenEvent]:
    return [event async for event in pair.decode.generate(request)]


def test_a_closed_engine_says_so_and_nothing_else(model: Tiny) -> None:
    with Pair(model.loaded) as pair:
        pair.decode.close()
        with pytest.raises(KVRoomError, match="the engine takes no more requests: it is closed"):
            asyncio.run(collect(pair, pair.request(prompt(4), max_tokens=3)))

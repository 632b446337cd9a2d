"""The prefix cache of both engines: the tokens that are moved and computed, and that no answer depends on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from identities import PROMPT
from kvroom.core.identity import KVIdentity
from kvroom.engine.request import GenerationStats, Request, TokenEvent
from kvroom.errors import KVRoomError, RoomFailed
from kvroom.wire import aux_message
from kvroom.wire.aux_message import Aux

from .pair import DEADLINE_S, Pair
from .tiny import Tiny, prompt, tiny

TOKEN_BYTES = 2 * 3 * 2 * 8 * 4  # key and value, layers, heads, elements, float32
PAGE = 8
SIZES = {"page_tokens": PAGE, "chunk_tokens": 16}


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny()


@pytest.fixture
def pair(model: Tiny) -> Iterator[Pair]:
    with Pair(model.loaded, prefill=SIZES, decode=SIZES) as pair:
        yield pair
        pair.check_idle()


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def stats_of(events: list[TokenEvent]) -> GenerationStats:
    stats = events[-1].stats
    assert stats is not None
    return stats


def served(pair: Pair, model: Tiny, prompt_ids: tuple[int, ...], count: int = 6) -> GenerationStats:
    """Serve one request, check its tokens, and return its costs."""
    [(events, result)] = pair.serve(pair.request(prompt_ids, max_tokens=count))
    assert tokens_of(events) == model.generate(prompt_ids, count)
    assert result.nbytes == stats_of(events).nbytes
    return stats_of(events)


# -- what is moved and computed ----------------------------------------------------------------------------------------


def test_a_second_prompt_with_the_same_beginning_moves_and_computes_only_its_tail(pair: Pair, model: Tiny) -> None:
    system = prompt(5 * PAGE + 3, seed=1)
    first = served(pair, model, system + prompt(10, seed=2))
    assert (first.cached_tokens, first.prefix_tokens) == (0, 0)
    assert (first.nbytes, first.pages) == (len(system + prompt(10)) * TOKEN_BYTES, 7)
    computed = pair.prefill.prompt_tokens_computed
    second = served(pair, model, system + prompt(21, seed=3))
    assert (second.cached_tokens, second.prefix_tokens) == (5 * PAGE, 5 * PAGE)
    assert (second.nbytes, second.pages) == ((3 + 21) * TOKEN_BYTES, 3)
    assert pair.prefill.prompt_tokens_computed - computed == 3 + 21
    for engine in (pair.prefill, pair.decode):
        assert engine.load().prompt_tokens_cached == 5 * PAGE
    assert pair.decode.prompt_tokens_computed == 0


def test_a_prompt_that_is_there_whole_moves_nothing_and_still_completes(pair: Pair, model: Tiny) -> None:
    ids = prompt(4 * PAGE, seed=1)
    served(pair, model, ids)
    computed = pair.prefill.prompt_tokens_computed
    again = served(pair, model, ids)
    assert (again.prefix_tokens, again.nbytes, again.pages) == (4 * PAGE, 0, 0)
    assert again.cached_tokens == 3 * PAGE  # the last token is always computed, because its logits give the next one
    assert pair.prefill.prompt_tokens_computed - computed == PAGE


def test_a_page_that_is_not_full_is_never_shared(pair: Pair, model: Tiny) -> None:
    ids = prompt(PAGE - 1, seed=1)
    for _ in range(3):
        took = served(pair, model, ids, 1)  # the last token of the answer is in no page either
        assert (took.cached_tokens, took.prefix_tokens, took.nbytes) == (0, 0, len(ids) * TOKEN_BYTES)
    pair.check_idle()
    assert pair.decode.load().pool.cached == pair.prefill.load().pool.cached == 0


def test_the_next_turn_finds_what_was_generated(pair: Pair, model: Tiny) -> None:
    ids = prompt(2 * PAGE + 3, seed=1)
    [(events, _)] = pair.serve(pair.request(ids, max_tokens=3 * PAGE, ignore_eos=True))
    longer = (*ids, *tokens_of(events), *prompt(5, seed=2))
    took = served(pair, model, longer)
    # The cache has the full pages of the first turn, whose newest token is in no page.
    assert took.prefix_tokens == (len(ids) + 3 * PAGE - 1) // PAGE * PAGE
    assert took.nbytes == (len(longer) - took.prefix_tokens) * TOKEN_BYTES
    assert took.cached_tokens == 2 * PAGE


def test_other_tokens_before_equal_ones_are_another_prefix(pair: Pair, model: Tiny) -> None:
    middle = prompt(3 * PAGE, seed=1)
    served(pair, model, prompt(PAGE, seed=2) + middle)
    took = served(pair, model, prompt(PAGE, seed=3) + middle)
    assert (took.cached_tokens, took.prefix_tokens) == (0, 0)


@pytest.mark.parametrize(("ours", "theirs"), [(4, 16), (16, 4), (5, 3)])
def test_each_side_has_pages_of_its_own_size(model: Tiny, ours: int, theirs: int) -> None:
    with Pair(model.loaded, prefill={"page_tokens": ours}, decode={"page_tokens": theirs}) as pair:
        system = prompt(50, seed=1)
        served(pair, model, system + prompt(9, seed=2))
        took = served(pair, model, system + prompt(9, seed=3))
        assert (took.cached_tokens, took.prefix_tokens) == (50 // ours * ours, 50 // theirs * theirs)
        assert took.nbytes == (59 - took.prefix_tokens) * TOKEN_BYTES
        pair.check_idle()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_what_is_cached_can_be_dropped(pair: Pair, model: Tiny, side: str) -> None:
    ids = prompt(4 * PAGE + 1, seed=1)
    served(pair, model, ids)
    engine = getattr(pair, side)
    engine.wait_idle(DEADLINE_S)
    cached = engine.load().pool.cached
    assert cached >= 4
    assert engine.drop_cache().result(DEADLINE_S) == cached
    assert engine.load().pool.free == engine.load().pool.pages
    took = served(pair, model, ids)
    assert (took.cached_tokens == 0, took.prefix_tokens == 0) == (side == "prefill", side == "decode")


def test_an_engine_that_has_ended_drops_nothing(model: Tiny) -> None:
    with Pair(model.loaded) as pair:
        pair.decode.close()
        with pytest.raises(KVRoomError, match="the engine has ended: it is closed"):
            pair.decode.drop_cache()


# -- no token depends on it --------------------------------------------------------------------------------------------


def crowd(pair: Pair, *, seed: int, count: int = 24) -> list[Request]:
    """Return prompts that begin with one of two texts, or with a part of one."""
    chosen = random.Random(seed)
    systems = [prompt(5 * PAGE + 2, seed=1), prompt(3 * PAGE, seed=2)]
    requests = []
    for number in range(count):
        system = chosen.choice(systems)
        ids = system[: chosen.choice([len(system), len(system), 2 * PAGE])] + prompt(chosen.randint(1, 12), seed=number)
        requests.append(pair.request(ids, max_tokens=chosen.randint(1, 14)))
    return requests


@pytest.mark.parametrize("decode_cache", [True, False])
@pytest.mark.parametrize("prefill_cache", [True, False])
def test_tokens_are_the_same_with_and_without_it_in_pools_that_are_too_small(
    model: Tiny, prefill_cache: bool, decode_cache: bool
) -> None:
    small = {**SIZES, "pool_pages": 20}
    prefill = {**small, "prefix_cache": prefill_cache}
    decode = {**small, "prefix_cache": decode_cache}
    with Pair(model.loaded, prefill=prefill, decode=decode) as pair:
        for seed in range(2):
            requests = crowd(pair, seed=seed)
            for request, (events, _) in zip(requests, pair.serve(*requests), strict=True):
                expected = model.generate(request.prompt_ids, request.max_tokens)
                assert tokens_of(events) == expected
                stats = stats_of(events)
                assert stats.nbytes == (len(request.prompt_ids) - stats.prefix_tokens) * TOKEN_BYTES
                assert stats.cached_tokens == 0 or prefill_cache
                assert stats.prefix_tokens == 0 or decode_cache
            pair.check_idle()
        for engine, has_cache in ((pair.prefill, prefill_cache), (pair.decode, decode_cache)):
            load = engine.load()
            assert (load.prompt_tokens_cached > 0, load.pages_evicted > 0, load.pool.cached > 0) == (has_cache,) * 3


def test_clients_that_leave_at_any_moment_leave_nothing_wrong_behind(model: Tiny) -> None:
    small = {**SIZES, "pool_pages": 24}

    async def leave(pair: Pair, request: Request, turns: int, after: int) -> None:
        prefill = asyncio.ensure_future(pair.prefill.prefill(request))
        seen: list[int] = []
        decode = asyncio.ensure_future(collect(pair, request, seen, after))
        for _ in range(turns if after == 0 else 0):
            await asyncio.sleep(0)
        if after == 0:
            decode.cancel()
        await asyncio.gather(decode, prefill, return_exceptions=True)
        assert seen == model.generate(request.prompt_ids, request.max_tokens)[: len(seen)]
        assert len(seen) >= min(after, 1)

    async def everybody(pair: Pair, seed: int) -> None:
        requests = crowd(pair, seed=seed, count=16)
        leaving = [leave(pair, request, 1 + 40 * number, number % 4) for number, request in enumerate(requests)]
        await asyncio.wait_for(asyncio.gather(*leaving), DEADLINE_S)

    with Pair(model.loaded, prefill={**small, "refusal_s": 0.05}, decode=small, bootstrap_s=30.0) as pair:
        for seed in range(3):
            asyncio.run(everybody(pair, seed))
            [request] = crowd(pair, seed=seed, count=1)
            served(pair, model, request.prompt_ids)
        pair.check_idle()


# -- a room that fails -------------------------------------------------------------------------------------------------


def test_what_a_failed_room_has_written_is_never_shared(pair: Pair, model: Tiny) -> None:
    """A prefill worker sends four pages of wrong bytes and dies: the next request for that prompt gets none of them."""
    ids = prompt(5 * PAGE, seed=1)

    async def poison(request: Request) -> None:
        pair.prefill.pool.data.fill_(17.0)
        with pair.prefill.manager.sender(request.bootstrap_room, identity=request.identity) as sender:
            waiting = asyncio.ensure_future(collect(pair, request))
            await pair.offered(request)
            sender.send((0, 1, 2, 3), stop=4 * PAGE)
            while pair.decode.manager.rooms()[0].phase != "RECEIVING":
                await asyncio.sleep(0)
            sender.abort("its worker has died")
            with pytest.raises(RoomFailed, match="its worker has died"):
                await waiting

    asyncio.run(poison(pair.request(ids, max_tokens=3)))
    pair.check_idle()
    assert bool((pair.decode.pool.data == 17.0).any())  # the bytes did arrive
    assert pair.decode.load().pool.cached == 0
    took = served(pair, model, ids)
    assert (took.prefix_tokens, took.nbytes) == (0, len(ids) * TOKEN_BYTES)


@pytest.mark.parametrize("field", ["prompt_ids", "cache_salt"])
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_two_requests_in_one_room_fail_and_nothing_is_filed(pair: Pair, model: Tiny, field: str, first: str) -> None:
    """The two legs have different prompts of equal length. Afterwards both prompts are served without a cached page."""
    ids, other = prompt(3 * PAGE, seed=1), prompt(3 * PAGE, seed=2)
    ours = pair.request(ids, max_tokens=6, cache_salt="one tenant")
    changed = {"prompt_ids": other} if field == "prompt_ids" else {"cache_salt": "another tenant"}
    theirs = msgspec.structs.replace(ours, **changed)

    async def both() -> list[BaseException | object]:
        legs: list[Coroutine[Any, Any, object]] = [pair.prefill.prefill(ours), collect(pair, theirs)]
        return list(await asyncio.gather(*(legs if first == "prefill" else legs[::-1]), return_exceptions=True))

    faults = asyncio.run(both())
    assert all(isinstance(error, RoomFailed) for error in faults)
    assert len({str(error) for error in faults}) == 1
    said = f"tokens is {3 * PAGE} ids" if field == "prompt_ids" else f"{field} is set"
    assert f"given different requests: {said} on the prefill side and another " in str(faults[0])
    pair.check_idle()
    assert pair.decode.load().pool.cached == 0
    for honest in (ids, other):
        assert served(pair, model, honest).prefix_tokens == 0


def test_tenants_with_different_salts_share_no_page(pair: Pair, model: Tiny) -> None:
    ids = prompt(3 * PAGE + 1, seed=1)

    def prefixes(salt: str) -> tuple[int, int]:
        """Return how many tokens were in the cache of each side."""
        [(events, _)] = pair.serve(pair.request(ids, max_tokens=6, cache_salt=salt))
        assert tokens_of(events) == model.generate(ids, 6)
        return stats_of(events).cached_tokens, stats_of(events).prefix_tokens

    assert [prefixes(salt) for salt in ("", "a", "b", "a", "", "ab")] == [
        (0, 0), (0, 0), (0, 0), (3 * PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE), (0, 0),
    ]  # fmt: skip


def test_pages_whose_salt_was_not_compared_are_not_shared(pair: Pair, model: Tiny) -> None:
    """A third-party prefill engine states no salt: its pages serve only the request that asked for them."""
    ids = prompt(3 * PAGE, seed=1)
    request = pair.request(ids, max_tokens=3)

    async def foreign() -> None:
        with pair.prefill.manager.sender(request.bootstrap_room, identity=KVIdentity.of(ids)) as sender:
            said = aux_message.encode_aux(Aux(tokens=len(ids), first_token=model.generate(ids, 1)[0]))
            sender.send((0, 1, 2), stop=len(ids), last=True, aux=said)
            await collect(pair, request)
            await sender

    asyncio.run(foreign())
    pair.check_idle()
    assert (pair.decode.load().succeeded, pair.decode.load().pool.cached) == (1, 0)


def test_pages_are_shared_only_after_their_room_has_succeeded(pair: Pair) -> None:
    """A second request comes while the first one waits for its bytes: it gets separate pages."""
    ids = prompt(3 * PAGE + 1, seed=1)

    async def both() -> None:
        requests = [pair.request(ids, max_tokens=2) for _ in range(2)]
        waiting = []
        for request in requests:
            waiting.append(asyncio.ensure_future(collect(pair, request)))
            await pair.offered(request)
        assert pair.decode.load().pool.owned == 8
        assert [view.pages for view in pair.decode.manager.rooms()] == [4, 4]
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        # The sources may still take the offers before the aborts of the decode side arrive.
        await asyncio.gather(*map(pair.prefill.prefill, requests), return_exceptions=True)

    asyncio.run(both())
    pair.check_idle()
    assert pair.decode.load().pool.cached == 0


async def collect(pair: Pair, request: Request, tokens: list[int] | None = None, most: int = 1000) -> None:
    """Append the tokens of a request to `tokens`, and leave after `most` of them; 0 means never."""
    seen = [] if tokens is None else tokens
    async with aclosing(pair.decode.generate(request)) as events:
        async for event in events:
            seen.append(event.token_id)
            if len(seen) == most:
                return


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pools(model: Tiny) -> Iterator[Pair]:
    with Pair(model.loaded, prefill={"page_tokens": 4}, decode={"page_tokens": 6}) as pair:
        generator = torch.Generator().manual_seed(0)
        pair.prefill.pool.data.copy_(torch.rand(pair.prefill.pool.data.shape, generator=generator) + 1)
        yield pair


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chunks_of_sends_bring_the_same_bytes(pools: Pair, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 90), label="tokens")
    prefix = data.draw(st.integers(0, tokens), label="prefix")
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1)), label="cuts")) if tokens > 1 else []
    source, sink = pools.prefill.pool, pools.decode.pool
    pages = data.draw(st.permutations(range(source.pages)), label="pages")[: source.pages_for(tokens)]
    sink_pages = data.draw(st.permutations(range(sink.pages)), label="sink pages")[: sink.pages_for(tokens)]
    offered = sink_pages[prefix // 6 :] if prefix < tokens else ()
    sink.data.zero_()
    room = pools.request((1,)).bootstrap_room
    with (
        pools.prefill.manager.sender(room, identity=PROMPT) as sender,
        pools.decode.manager.receiver(pools.address, room, identity=PROMPT) as receiver,
    ):
        receiver.send_metadata(offered, tokens=tokens, decode_prefix_len=prefix)
        start = 0
        for stop in [*cuts, tokens]:
            sender.send(pages[start // 4 : source.pages_for(stop)], stop=stop, last=stop == tokens)
            start = stop
        assert receiver.wait(DEADLINE_S).nbytes == (tokens - prefix) * TOKEN_BYTES
    expected = torch.zeros_like(sink.data)
    there = source.data[:, :, pages].flatten(2, 3)[:, :, prefix:tokens]
    rows = torch.arange(prefix, tokens)
    expected[:, :, torch.tensor(sink_pages)[rows // 6], rows % 6] = there
    assert torch.equal(sink.data, expected)

"""Models with more than keys and values of every token: their windows and states are handed over, and no more bytes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import aclosing

import pytest
import torch

from kvroom.engine.lease import Lease
from kvroom.engine.pages import PoolCounts
from kvroom.engine.pool import PagedPool
from kvroom.engine.request import GenerationStats, Request
from kvroom.engine.shape import CacheShape, KVShape, StateShape
from kvroom.errors import KVRoomError, RoomFailed

from .pair import Pair
from .tiny import ALL_SLIDING, SLIDING, STATEFUL, WINDOW, Tiny, prompt, tiny

LAYER_BYTES = 2 * 2 * 8 * 4  # of a token: key and value, heads, elements, float32
PAGE = 8
SIZES = {"page_tokens": PAGE, "chunk_tokens": 16}
LENGTHS = [1, 3, 8, 11, 12, 13, 40, 90]


@pytest.fixture(scope="module", params=sorted({**SLIDING, **STATEFUL}))
def model(request: pytest.FixtureRequest) -> Tiny:
    return tiny(request.param)


@pytest.fixture(scope="module")
def shared(model: Tiny) -> Iterator[Pair]:
    """Yield a pair whose page sizes differ, and whose chunks end inside pages."""
    with Pair(model.loaded, prefill={"page_tokens": 4, "chunk_tokens": 7}, decode=SIZES) as pair:
        yield pair


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.check_idle()


def nbytes_of(model: Tiny, tokens: int) -> int:
    """Return the bytes that are kept of a prompt of this number of tokens."""
    shape = model.loaded.shape
    kept = len(shape.full.layers) * tokens * LAYER_BYTES
    if shape.sliding is not None:
        kept += len(shape.sliding.layers) * min(tokens, shape.window) * LAYER_BYTES
    states: int = sum(math.prod(state.sizes) * state.dtype.itemsize for state in shape.states)
    return kept + states


def stats_of(pair: Pair, model: Tiny, *requests: Request) -> list[GenerationStats]:
    """Serve requests at the same time, check their tokens, and return the costs."""
    found = []
    for request, (events, result) in zip(requests, pair.serve(*requests), strict=True):
        expected = model.generate(request.prompt_ids, request.max_tokens)
        assert [event.token_id for event in events] == expected
        stats = events[-1].stats
        assert stats is not None
        assert stats.nbytes == result.nbytes
        found.append(stats)
    return found


@pytest.mark.sampled(together="model", least=3)
def test_every_token_equals_transformers_and_only_what_is_kept_moves(pair: Pair, model: Tiny) -> None:
    requests = [pair.request(prompt(length, seed=length), max_tokens=30) for length in LENGTHS]
    found = stats_of(pair, model, *requests)
    assert [stats.nbytes for stats in found] == [nbytes_of(model, length) for length in LENGTHS]
    assert pair.decode.prompt_tokens_computed == 0


@pytest.mark.sampled(together="model", least=3)
def test_pages_and_slots_are_used_again(model: Tiny) -> None:
    """Twelve requests come and two run at a time, so each gets pages and slots with data of earlier requests."""
    few = {**SIZES, "pool_pages": 16, "max_running": 2}
    with Pair(model.loaded, prefill=few, decode=few) as pair:
        requests = [pair.request(prompt(5 + 7 * seed, seed=seed), max_tokens=24) for seed in range(12)]
        stats_of(pair, model, *requests)
        pair.check_idle()


@pytest.mark.sampled(together="model", least=3)
def test_a_request_that_ends_early_gives_back_its_pages_and_slots(pair: Pair, model: Tiny) -> None:
    async def leave(request: Request, after: int) -> None:
        prefill = asyncio.ensure_future(pair.prefill.prefill(request))
        async with aclosing(pair.decode.generate(request)) as events:
            for _ in range(after):
                await anext(events)
        await asyncio.gather(prefill, return_exceptions=True)

    async def everybody() -> None:
        requests = [pair.request(prompt(20), max_tokens=50, ignore_eos=True) for _ in range(6)]
        await asyncio.gather(*(leave(request, 1 + number % 3) for number, request in enumerate(requests)))

    asyncio.run(everybody())
    pair.check_idle()
    stats_of(pair, model, pair.request(prompt(50), max_tokens=10))


@pytest.mark.sampled(together="model", least=3)
def test_a_room_that_fails_gives_back_its_pages_and_slots(pair: Pair) -> None:
    async def fail(request: Request) -> None:
        waiting = asyncio.ensure_future(anext(pair.decode.generate(request)))
        await pair.offered(request)
        assert all(counts.owned for counts in pair.decode.load().groups.values())
        pair.prefill.refuse(request.bootstrap_room, "its prompt is too dear")
        with pytest.raises(RoomFailed, match="too dear"):
            await waiting

    asyncio.run(fail(pair.request(prompt(20), max_tokens=5)))
    pair.check_idle()


@pytest.mark.sampled(together="model", least=3)
def test_there_is_no_prefix_cache_and_it_says_why(pair: Pair, model: Tiny) -> None:
    group = "swa" if model.loaded.shape.sliding else "state"
    for engine in (pair.prefill, pair.decode):
        assert engine.prefix_cache == f"off: the model keeps only the newest tokens of {group}"
    ids = prompt(6 * PAGE, seed=1)
    for _ in range(2):
        [stats] = stats_of(pair, model, pair.request(ids, max_tokens=5))
        assert (stats.cached_tokens, stats.prefix_tokens, stats.nbytes) == (0, 0, nbytes_of(model, len(ids)))


@pytest.mark.parametrize("kind", sorted(ALL_SLIDING))
def test_windows_in_every_layer_keep_everything_and_have_a_prefix_cache(kind: str) -> None:
    model = tiny(kind)
    with Pair(model.loaded, prefill=SIZES, decode=SIZES) as pair:
        ids = prompt(40, seed=1)
        [first] = stats_of(pair, model, pair.request(ids + prompt(9, seed=2), max_tokens=30))
        [second] = stats_of(pair, model, pair.request(ids + prompt(9, seed=3), max_tokens=30))
        assert (first.nbytes, second.nbytes) == (49 * 3 * LAYER_BYTES, 9 * 3 * LAYER_BYTES)
        pair.check_idle()


# -- pages of windows and slots of states ------------------------------------------------------------------------------

BOTH = CacheShape(
    KVShape((1, 4), 2, 8), KVShape((0, 2), 1, 4), 10, (StateShape(3, "conv1", (6, 3), torch.bfloat16),
                                                       StateShape(4, "recurrent1", (2, 5), torch.float32)),
)  # fmt: skip


def make_pool(*, slots: int = 3, chunk: int = 7, pages: int = 64) -> PagedPool:
    return PagedPool(BOTH, pages=pages, page_tokens=4, dtype=torch.bfloat16, slots=slots, chunk_tokens=chunk)


def test_a_request_takes_what_its_window_and_its_chunks_reach_over() -> None:
    pool = make_pool()
    assert pool.needs(5) == {"": 2, "swa": 2, "state": 1}
    assert pool.needs(200) == {"": 50, "swa": 5, "state": 1}  # 9 tokens before a chunk of 7, wherever pages begin
    assert pool.others() == {"swa": PoolCounts(15, 15, 0, 0, 0), "state": PoolCounts(3, 3, 0, 0, 0)}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_no_page_of_a_ring_holds_two_things_that_are_needed_at_once(chunk: int) -> None:
    pool = make_pool(chunk=chunk)
    lease = Lease(pool)
    assert lease.take(100)
    held: dict[int, int] = {}  # the page of the sequence that each page of the ring was last written with
    for start in range(0, 100, chunk):
        stop = min(start + chunk, 100)
        ring = lease.chunk(range(start, stop), start).ring
        for position in range(start, stop):
            held[ring[position // 4 % len(ring)]] = position // 4
        needed = range(max(0, start - 9) // 4, (stop - 1) // 4 + 1)
        assert set(needed) <= set(held.values())
        window = lease.windows(stop)["swa"]
        assert [held[page] for page in window] == list(range(max(0, stop - 10) // 4, (stop - 1) // 4 + 1))


def test_a_lease_takes_of_every_group_or_of_none_and_returns_all() -> None:
    pool = make_pool(slots=2)
    leases = [Lease(pool) for _ in range(3)]
    assert [lease.take(20) for lease in leases] == [True, True, False]
    assert {name: counts.owned for name, counts in pool.others().items()} == {"swa": 10, "state": 2}
    assert pool.book.counts().owned == 10
    leases[0].attach_room()
    leases[0].drop()
    assert {name: counts.quarantined for name, counts in pool.others().items()} == {"swa": 5, "state": 1}
    assert not pool.whole()
    leases[0].detach_room()
    leases[1].drop()
    pool.check_idle()
    assert pool.whole()


@pytest.mark.parametrize("group", ["", "swa", "state"])
def test_a_page_of_any_group_that_is_held_or_lost_is_found(group: str) -> None:
    pool = make_pool()
    [page] = pool.books[group].allocate(1) or ()
    pool.check()
    assert not pool.whole()
    with pytest.raises(KVRoomError, match="not idle"):
        pool.check_idle()
    pool.books[group]._owned.remove(page)
    with pytest.raises(KVRoomError, match="lost or counted twice"):
        pool.check()


def test_the_layout_points_at_every_groups_memory() -> None:
    pool = make_pool()
    layout = pool.layout("model-x")
    assert [(group.name, group.window) for group in layout.groups] == [("swa", 10), ("state", 1)]
    assert [(region.layer, region.component, region.group) for region in layout.regions] == [
        (1, "k", ""), (1, "v", ""), (4, "k", ""), (4, "v", ""),
        (0, "k", "swa"), (0, "v", "swa"), (2, "k", "swa"), (2, "v", "swa"),
        (3, "conv1", "state"), (4, "recurrent1", "state"),
    ]  # fmt: skip
    states = pool.states
    assert states is not None
    for slot in range(3):
        request = states.of(slot, fresh=False)
        for region, tensor in zip(
            layout.regions[-2:], (request.get_conv_state(3), request.get_recurrent_state(4)), strict=True
        ):
            assert tensor is not None
            assert tensor.data_ptr() == region.base + slot * region.page_stride
            assert tensor.nbytes == region.head_bytes
    assert layout.window_nbytes(0, 1, "state") == 6 * 3 * 2 + 2 * 5 * 4
    assert layout.window_start("swa", WINDOW) == 2


def test_states_of_another_form_are_not_mixed_up() -> None:
    one, other = (region.format for region in make_pool().layout("x").regions if region.group == "state")
    assert (one, other) == ("bfloat16[6, 3]", "float32[2, 5]")

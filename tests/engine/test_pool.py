"""The pool: free + owned + quarantined is all of it, and no page has two owners."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvroom.engine.attention import KVShape
from kvroom.engine.pool import Lease, PagedPool, PoolCounts
from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError

SHAPE = KVShape(layers=2, kv_heads=3, head_dim=4)


def make_pool(pages: int = 8, dtype: torch.dtype = torch.float32) -> PagedPool:
    return PagedPool(SHAPE, pages=pages, page_tokens=4, dtype=dtype)


def test_allocation_is_all_or_nothing() -> None:
    pool = make_pool()
    first = pool.allocate(5)
    assert first == (0, 1, 2, 3, 4)
    assert pool.allocate(4) is None
    assert pool.counts() == PoolCounts(pages=8, free=3, owned=5, quarantined=0)
    pool.release(first)
    pool.check_idle()


def test_quarantined_pages_are_nobodys_until_they_are_released() -> None:
    pool = make_pool()
    pages = pool.allocate(6) or ()
    pool.quarantine(pages)
    assert pool.counts() == PoolCounts(pages=8, free=2, owned=0, quarantined=6)
    assert pool.allocate(3) is None
    with pytest.raises(KVRoomError, match="not whole"):
        pool.check_idle()
    pool.release(pages)
    pool.check_idle()


def test_a_page_cannot_be_released_twice_and_nothing_changes() -> None:
    pool = make_pool()
    pages = pool.allocate(3) or ()
    pool.release(pages[:1])
    before = pool.counts()
    with pytest.raises(KVRoomError, match=r"pages \[0\] are free"):
        pool.release(pages)
    with pytest.raises(KVRoomError, match=r"pages \[0\] are not owned"):
        pool.quarantine(pages)
    assert pool.counts() == before


@pytest.mark.parametrize("holder", ["_free", "_owned", "_quarantined"])
def test_a_lost_page_and_one_with_two_holders_are_found(holder: str) -> None:
    def mixed() -> PagedPool:
        pool = make_pool()
        pages = pool.allocate(5) or ()
        pool.quarantine(pages[:2])
        pool.check()
        return pool

    lost, twice = mixed(), mixed()
    getattr(lost, holder).remove(next(iter(getattr(lost, holder))))
    other = "_owned" if holder != "_owned" else "_quarantined"
    getattr(twice, other).add(next(iter(getattr(twice, holder))))
    for pool in (lost, twice):
        with pytest.raises(KVRoomError, match="lost or counted twice"):
            pool.check()


def test_what_can_never_fit_is_named() -> None:
    pool = make_pool()
    pool.check_fits(32)
    with pytest.raises(InvalidRequest, match="needs 9 pages for 33 tokens and the pool has 8"):
        pool.check_fits(33)
    with pytest.raises(ConfigurationError, match="a pool of 0 pages"):
        make_pool(pages=0)


@given(st.lists(st.sampled_from(["take", "lend", "give_back", "drop"]), max_size=12))
def test_a_lease_returns_its_pages_when_neither_side_holds_them(events: list[str]) -> None:
    pool = make_pool()
    lease = Lease(pool)
    taken = lent = dropped = False
    for event in events:
        if event == "take" and not taken and not dropped:
            taken = lease.take(3)
        elif event == "lend" and not dropped:
            lease.lend()
            lent = True
        elif event == "give_back":
            lease.give_back()
            lent = False
        elif event == "drop":
            lease.drop()
            dropped = True
        held = 3 * taken
        expected = (held, 0) if not dropped else (0, held if lent else 0)
        assert (pool.counts().owned, pool.counts().quarantined) == expected
        assert pool.counts().free + pool.counts().owned + pool.counts().quarantined == 8
    lease.give_back()
    lease.drop()
    pool.check_idle()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_points_at_the_tensor(dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype)
    layout = pool.layout("model-x")
    assert (layout.pages, layout.page_tokens, layout.model) == (8, 4, "model-x")
    assert layout.dtype == str(dtype).removeprefix("torch.")
    assert [(region.layer, region.component) for region in layout.regions] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    for region in layout.regions:
        there = pool.data[region.layer, "kv".index(region.component), 5, 2, 1]
        address = region.base + 5 * region.page_stride + 2 * region.token_stride + region.head_stride
        assert (there.data_ptr(), there.nbytes) == (address, region.head_bytes)
    assert sum(memory.nbytes for memory in layout.memory()) == pool.data.nbytes

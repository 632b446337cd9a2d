"""The pool's tensor: its capacity, and the place of each element according to the layout."""

from __future__ import annotations

import os
import re

import pytest
import torch

from kvroom.engine.memory import free_bytes
from kvroom.engine.pool import PagedPool
from kvroom.engine.shape import CacheShape, KVShape, StateShape
from kvroom.errors import ConfigurationError, InvalidRequest
from kvroom.transports.kit.pool import allocate

SHAPE = CacheShape(KVShape(layers=(0, 1), kv_heads=3, head_dim=4))


def make_pool(pages: int = 8, dtype: torch.dtype = torch.float32) -> PagedPool:
    return PagedPool(SHAPE, pages=pages, page_tokens=4, dtype=dtype)


def test_what_can_never_fit_is_named() -> None:
    pool = make_pool()
    pool.check_fits(32)
    with pytest.raises(InvalidRequest, match="needs 9 pages for 33 tokens and the pool has 8"):
        pool.check_fits(33)
    with pytest.raises(ConfigurationError, match="invalid pool: 0 pages"):
        make_pool(pages=0)


HYBRID = CacheShape(
    KVShape(layers=(0,), kv_heads=3, head_dim=4),
    KVShape(layers=(1,), kv_heads=3, head_dim=4),
    window=8,
    states=(StateShape(0, "conv1", (16, 3), torch.float32),),
)


@pytest.mark.parametrize("count", [10**9, 10**12, 10**15, 10**30])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pages", r"at most \d+ pages fit \(--pages\)"),
        ("page_tokens", r"use smaller pages \(--page-tokens\)"),
        ("slots", r"allow fewer running requests \(--max-running\)"),
    ],
)
def test_a_pool_that_no_memory_holds_is_refused_with_what_is_possible(name: str, says: str, count: int) -> None:
    sizes = {"pages": 8, "page_tokens": 4, "slots": 2} | {name: count * 1000}
    with pytest.raises(ConfigurationError, match=says) as caught:
        PagedPool(
            HYBRID,
            pages=sizes["pages"],
            page_tokens=sizes["page_tokens"],
            slots=sizes["slots"],
            dtype=torch.float32,
        )
    said = str(caught.value)
    assert f"a pool of {sizes['pages']} pages of {sizes['page_tokens']} tokens takes " in said
    takes, holds = (
        int(re.findall(pattern, said)[0]) for pattern in (r"takes (\d+) bytes", r"and (\d+) bytes are free")
    )
    assert takes > holds > 0


def test_the_pages_that_are_said_to_fit_do() -> None:
    """A page has 768 bytes: the error names the number of pages that the free memory holds."""
    with pytest.raises(ConfigurationError) as caught:
        make_pool(pages=10**15)
    named = re.search(r"at most (\d+) pages fit", str(caught.value))
    assert named is not None
    assert int(named[1]) * 768 == pytest.approx(free_bytes("cpu"), rel=0.2)


@pytest.mark.parametrize("nbytes", [2**62, 2**63, 2**70])
@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_no_address_reaches_is_refused(shared: bool, nbytes: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        ConfigurationError, match=f"a pool of {nbytes} bytes cannot be allocated: .*; ask for a smaller"
    ):
        allocate(nbytes, shared=shared)
    assert len(os.listdir("/proc/self/fd")) == descriptors


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

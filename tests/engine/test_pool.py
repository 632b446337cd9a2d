"""The pool's tensor: what fits in it, and where its layout says that each element lies."""

from __future__ import annotations

import pytest
import torch

from kvroom.engine.pool import PagedPool
from kvroom.engine.shape import CacheShape, KVShape
from kvroom.errors import ConfigurationError, InvalidRequest

SHAPE = CacheShape(KVShape(layers=(0, 1), kv_heads=3, head_dim=4))


def make_pool(pages: int = 8, dtype: torch.dtype = torch.float32) -> PagedPool:
    return PagedPool(SHAPE, pages=pages, page_tokens=4, dtype=dtype)


def test_what_can_never_fit_is_named() -> None:
    pool = make_pool()
    pool.check_fits(32)
    with pytest.raises(InvalidRequest, match="needs 9 pages for 33 tokens and the pool has 8"):
        pool.check_fits(33)
    with pytest.raises(ConfigurationError, match="a pool of 0 pages"):
        make_pool(pages=0)


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

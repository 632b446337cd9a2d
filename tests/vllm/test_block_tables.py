"""Translation of block ids from vLLM's own KV cache manager into pages: exactly the requested tokens, no null block."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupRole,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from kvroom.adapters.vllm.blocks import BlockTables, groups_of
from kvroom.errors import ConfigurationError, PlanError
from kvroom.plan import KVGroup, KVLayout, KVRegion

SIZE = 16
COMMON: dict[str, Any] = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}


def full(block_size: int = SIZE) -> Any:
    return FullAttentionSpec(block_size=block_size, **COMMON)


def sliding(window: int, block_size: int = SIZE, extra: int = 0) -> Any:
    return SlidingWindowSpec(block_size=block_size, sliding_window=window, extra_retained_tokens=extra, **COMMON)


def config(*specs: Any) -> Any:
    groups = [KVCacheGroupSpec([f"model.layers.{i}.attn"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=400, kv_cache_tensors=[], kv_cache_groups=groups)


def manager(cache: Any) -> Any:
    sizes = [group.kv_cache_spec.block_size for group in cache.kv_cache_groups]
    return KVCacheManager(
        cache, max_model_len=2048, scheduler_block_size=max(sizes), hash_block_size=min(sizes), enable_caching=False
    )


def request(name: str, tokens: int) -> Any:
    return Request(name, list(range(tokens)), SamplingParams(max_tokens=4), None)


def prefilled(dealer: Any, name: str, tokens: int, chunk: int) -> Any:
    """Return the block ids after the whole prompt has been computed, with `chunk` tokens in each step."""
    asked = request(name, tokens)
    while asked.num_computed_tokens < tokens:
        step = min(chunk, tokens - asked.num_computed_tokens)
        assert dealer.allocate_slots(asked, step) is not None
        asked.num_computed_tokens += step
    return dealer.get_block_ids(name)


def awaiting(dealer: Any, name: str, tokens: int, external: int) -> Any:
    """Return the block ids of a request that waits for `external` tokens from another engine."""
    asked = request(name, tokens)
    assert dealer.allocate_slots(asked, 0, num_external_computed_tokens=external, delay_cache_blocks=True) is not None
    return dealer.get_block_ids(name)


def of_tokens(blocks: list[int], size: int, tokens: range) -> list[int]:
    """Return the blocks that hold these tokens, in order, found token by token."""
    return list(dict.fromkeys(blocks[token // size] for token in tokens))


def test_pages_hold_exactly_the_tokens() -> None:
    tables = BlockTables(config(full()))
    rng = random.Random(1)
    for _ in range(300):
        ids = rng.sample(range(1, 1000), rng.randint(1, 40))
        stop = rng.randint(0, len(ids) * SIZE)
        start = rng.randint(0, stop)
        assert tables.pages((ids,), start, stop) == of_tokens(ids, SIZE, range(start, stop))
        assert tables.main_blocks((ids,), start, stop) == of_tokens(ids, SIZE, range(start, stop))
    assert (tables.block_size, tables.align(47), tables.align(48), tables.handed(48)) == (16, 32, 48, 48)
    assert tables.windows(([1, 2, 3],), 48) == {}


@pytest.mark.parametrize("window", [2, 16, 17, 18, 40, 49])
@pytest.mark.parametrize("chunk", [1024, 48, 7, 1])
def test_windows_are_there_on_both_sides(window: int, chunk: int) -> None:
    """The window of the next token is moved, and nothing before it.

    vLLM frees the blocks before a window while it computes, so the tokens of the window must still be there. A block
    that is loaded in part would get into the prefix cache like a complete one.
    """
    cache = config(full(), sliding(window))
    tables, group = BlockTables(cache), "window.1"
    kept = groups_of(cache)[1].window
    for tokens in (2, 15, 16, 17, 31, 33, 40, 55, 56, 57, 95, 96, 97, 111, 112, 113, 128):
        stop = tables.handed(tokens)
        assert tokens - 1 - SIZE < stop <= tokens - 1
        assert max(0, stop - kept) % SIZE == 0
        source, sink = manager(cache), manager(cache)
        here = prefilled(source, "p", stop, chunk)
        there = awaiting(sink, "d", tokens, stop)
        attended = range(max(0, stop + 1 - window), stop)  # by the next token, which the sink computes
        assert attended == range(max(0, stop - kept), stop)
        for ids in (here, there):
            pages = tables.windows(ids, stop)[group]
            assert 0 not in pages
            assert pages == of_tokens(ids[1], SIZE, range(max(0, stop - kept), stop))
        assert len(tables.pages(here, 0, stop)) == len(tables.pages(there, 0, stop))


def test_the_whole_prompt_would_lose_a_token_of_the_window() -> None:
    """`handed` omits the last token: for a load of all 55, vLLM frees token 15, which is in the last one's window."""
    cache = config(full(), sliding(40))
    _, blocks = awaiting(manager(cache), "d", 55, 55)
    assert blocks[15 // SIZE] == 0
    _, blocks = awaiting(manager(cache), "d", 55, BlockTables(cache).handed(55))
    assert blocks[15 // SIZE] != 0


def test_counts_are_those_that_rooms_ask_for() -> None:
    """The lists are as long as the library requires: it refuses a list of another length than its count of pages."""
    cache = config(full(), sliding(40), full())
    tables = BlockTables(cache)
    common: dict[str, Any] = {
        "component": "k", "pages": 400, "page_stride": SIZE * 8, "page_tokens": SIZE, "token_stride": 8,
        "heads": 1, "head_stride": 8, "head_bytes": 8, "head_range": (0, 1),
    }  # fmt: skip
    regions = [KVRegion(layer=g.number, base=g.number << 20, group=g.name, **common) for g in tables.groups]
    declared = tuple(KVGroup(name=g.name, window=g.window) for g in tables.groups if g.name)
    layout = KVLayout(tuple(regions), "bfloat16", groups=declared)
    for tokens in range(1, 130):
        ids = [list(range(1, 10))] * 3
        windows = tables.windows(ids, tokens)
        assert len(tables.pages(ids, 0, tokens)) == layout.window_pages(0, tokens)
        assert set(windows) == {"window.1", "full.2"}
        for name, pages in windows.items():
            assert len(pages) == layout.window_pages(layout.window_start(name, tokens), tokens, name)


def test_groups_are_named_by_their_place() -> None:
    named = groups_of(config(sliding(40, extra=3), full(32), sliding(8), full()))
    assert [(g.number, g.name, g.window, g.block_size) for g in named] == [
        (0, "window.0", 42, 16),
        (1, "", 0, 32),
        (2, "window.2", 7, 16),
        (3, "full.3", 0, 16),
    ]
    tables = BlockTables(config(sliding(40), full(32)))
    assert (tables.block_size, tables.align(70)) == (32, 64)
    assert tables.main_blocks(([1, 2, 3], [7, 8]), 0, 40) == [7, 8]


def test_a_model_of_windows_alone_has_no_main_pages() -> None:
    tables = BlockTables(config(sliding(40)))
    ids = awaiting(manager(config(sliding(40))), "d", 100, 99)
    assert tables.pages(ids, 0, 99) == []
    assert tables.windows(ids, 99) == {"window.0": ids[0][3:7]}
    assert tables.main_blocks(ids, 0, 99) == ids[0][3:7]
    assert tables.block_size == SIZE


def test_layers_of_one_type_in_one_group() -> None:
    both = {"model.layers.0.attn": full(), "model.layers.1.attn": MLAAttentionSpec(block_size=SIZE, **COMMON)}
    assert [g.name for g in groups_of(config(UniformTypeKVCacheSpecs(block_size=SIZE, kv_cache_specs=both)))] == [""]
    mixed = {"model.layers.0.attn": full(), "model.layers.1.attn": sliding(40)}
    with pytest.raises(ConfigurationError, match=r"group 0 mixes the sliding windows \[40, None\]"):
        groups_of(config(UniformTypeKVCacheSpecs(block_size=SIZE, kv_cache_specs=mixed)))


@pytest.mark.parametrize(
    "spec",
    [
        MambaSpec(block_size=SIZE, shapes=((2, 3),), dtypes=(torch.float32,)),
        ChunkedLocalAttentionSpec(block_size=SIZE, attention_chunk_size=64, **COMMON),
        CrossAttentionSpec(block_size=SIZE, **COMMON),
        SinkFullAttentionSpec(block_size=SIZE, sink_len=4, **COMMON),
        RSWASpec(block_size=SIZE, rswa_window=64, **COMMON),
    ],
)
def test_other_kinds_of_layers_are_refused_by_name(spec: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"group 1 \(layers \['model.layers.1.attn'\]\).*{type(spec).__name__}"
    ):
        BlockTables(config(full(), spec))


def test_host_caches_and_models_without_cache_are_refused() -> None:
    cache = config(full(), full())
    cache.kv_cache_groups[1].role = KVCacheGroupRole.HISPARSE_SOURCE
    with pytest.raises(ConfigurationError, match="hisparse_source"):
        BlockTables(cache)
    with pytest.raises(ConfigurationError, match="sliding window of 1: its layers read no earlier token"):
        BlockTables(config(full(), sliding(1)))
    with pytest.raises(ConfigurationError, match="no KV cache"):
        BlockTables(config())


def test_absent_blocks_are_an_error() -> None:
    tables = BlockTables(config(full(), sliding(40)))
    ids = ([1, 2, 3], [0, 4, 5])
    with pytest.raises(PlanError, match=r"tokens \[32, 49\) .* blocks \[2, 4\), but the request has 3"):
        tables.pages(ids, 32, 49)
    with pytest.raises(PlanError, match="block 0 of the request is vLLM's null block"):
        tables.windows(ids, 48)
    with pytest.raises(PlanError, match="expected block ids of 2 KV cache groups, as vLLM was started with, got 1"):
        tables.pages(([1, 2],), 0, 16)
    for start, stop in ((-1, 4), (5, 4)):
        with pytest.raises(PlanError, match="invalid range"):
            tables.pages(ids, start, stop)
    assert tables.pages(ids, 17, 17) == []
    assert tables.main_blocks(([0, 2, 3], []), 0, 48) == [2, 3]

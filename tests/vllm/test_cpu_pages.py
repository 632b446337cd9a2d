"""Pages of CPU attention, whose inner order only vLLM knows: its own kernels write and read the pages handed over."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from caches import (
    BF16,
    HEADS,
    LAYERS,
    Rank,
    allocate,
    engine_config,
    full,
    hand_over,
    hybrid,
    layer_of,
    mla,
    name_of,
    rank,
    run,
)
from vllm._custom_ops import (
    cpu_attention_with_kv_cache,
    cpu_attn_get_scheduler_metadata,
    cpu_attn_reshape_and_cache,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SparseCacheRole,
)

from kvroom.adapters.vllm import layout as described
from kvroom.adapters.vllm.blocks import BlockTables
from kvroom.errors import ConfigurationError, PlanError
from kvroom.plan import Planner


@pytest.fixture(scope="module", autouse=True)
def amx() -> None:
    """Request the AMX registers from Linux, if the CPU has AMX. In a server, a model's matrix products do that."""
    torch.cpu._init_amx()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine_config(tmp_path_factory.mktemp("model"))


class Attention(NamedTuple):
    """One layer of CPU attention: vLLM's own kernels over a cache [blocks, heads, tokens, 2 * head size]."""

    lanes: int
    block: int

    @property
    def isa(self) -> str:
        return str(_get_attn_isa(BF16, self.block, self.lanes, "auto"))

    def halves(self, cache: Any) -> Any:
        """Return K and V as vLLM's backend passes them to the kernels."""
        return cache.view(cache.shape[0], cache.shape[1], 2 * cache.shape[2], self.lanes).chunk(2, dim=2)

    def write(self, cache: Any, blocks: list[int], key: Any, value: Any) -> None:
        """Write the keys and values [tokens, heads, head size] of a request's tokens, from token 0 on."""
        slots = torch.tensor([blocks[t // self.block] * self.block + t % self.block for t in range(len(key))])
        cpu_attn_reshape_and_cache(key, value, *self.halves(cache), slots, self.isa)

    def read(self, cache: Any, blocks: list[int], query: Any, tokens: int) -> Any:
        """Return the attention output for a query [1, 2 * heads, head size] at the request's last token."""
        lengths, starts = torch.tensor([tokens], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        heads, output = cache.shape[1], torch.zeros_like(query)
        plan = cpu_attn_get_scheduler_metadata(
            num_reqs=1, num_heads=2 * heads, num_kv_heads=heads, head_dim=self.lanes, seq_lens=lengths, dtype=BF16,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa, enable_kv_split=False,
        )  # fmt: skip
        key, value = self.halves(cache)
        cpu_attention_with_kv_cache(
            query=query, key_cache=key, value_cache=value, output=output, query_start_loc=starts, seq_lens=lengths,
            scale=self.lanes**-0.5, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=torch.tensor([blocks], dtype=torch.int32), softcap=0, scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return output


def opaque(engine: Any, kernel: Attention, heads: int, **how: Any) -> Rank:
    spec = FullAttentionSpec(block_size=kernel.block, num_kv_heads=heads, head_size=kernel.lanes, dtype=BF16)
    made = rank(engine, {name_of(i): spec for i in range(LAYERS)}, CPUAttentionBackend, **how)
    made.storage()[:] = 0
    return made


@pytest.mark.parametrize("kernel", [Attention(32, 32), Attention(64, 128), Attention(80, 64)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cpu_attention_reads_pages_that_were_handed_over(engine: Any, kernel: Attention, ranks: int) -> None:
    """The output is the same, bit by bit, after a hand-off from 1, 2 or 4 ranks to one with another pool and blocks."""
    tokens, torch_seed = 2 * kernel.block + 5, torch.manual_seed(7)
    theirs, ours = [3, 9, 1], [5, 2, 6]
    key, value = (torch.randn(LAYERS, tokens, HEADS, kernel.lanes, generator=torch_seed).to(BF16) for _ in "kv")
    each = HEADS // ranks
    sources = [opaque(engine, kernel, each, tp=ranks, tp_rank=r) for r in range(ranks)]
    alone, target = opaque(engine, kernel, HEADS), opaque(engine, kernel, HEADS, blocks=7)
    for layer in range(LAYERS):
        name = name_of(layer)
        kernel.write(alone.caches[name], theirs, key[layer], value[layer])
        for r, source in enumerate(sources):
            mine = slice(r * each, (r + 1) * each)
            kernel.write(source.caches[name], theirs, key[layer, :, mine], value[layer, :, mine])
    hand_over([(source, theirs) for source in sources], target, ours, 0, tokens)
    for name, cache in target.caches.items():
        assert torch.equal(cache[ours], alone.caches[name][theirs])
        assert not cache[[0, 1, 3, 4]].any()
        query = torch.randn(1, 2 * HEADS, kernel.lanes, generator=torch_seed).to(BF16)
        output = kernel.read(cache, ours, query, tokens)
        assert torch.equal(output, kernel.read(alone.caches[name], theirs, query, tokens))
        assert output.abs().sum() > 0


def test_cpu_attention_reads_its_own_order(engine: Any) -> None:
    """A page does not hold K and V token by token, so it must not be cut. The other tests depend on this."""
    kernel = Attention(32, 32)
    cache = opaque(engine, kernel, HEADS).caches[name_of(0)]
    key = torch.arange(32 * HEADS * 32, dtype=torch.float32).remainder(250).to(BF16).view(32, HEADS, 32)
    kernel.write(cache, [3], key, key)
    assert not torch.equal(cache[3, 0, :, :32], key[:, 0])


def test_cpu_pages_are_one_block_each_if_all_heads_move(engine: Any) -> None:
    kernel = Attention(64, 128)
    source, target = opaque(engine, kernel, HEADS), opaque(engine, kernel, HEADS, blocks=7)
    assert len(source.layout.regions) == LAYERS * HEADS
    blocks = Planner(source.layout, target.layout).copies([3, 9, 4], [5, 2, 3], 0, 300)
    assert sorted(blocks.length.tolist()) == [HEADS * 128 * 128 * 2] * 3 * LAYERS


def test_opaque_pages_move_whole_and_between_equals_only(engine: Any) -> None:
    kernel = Attention(64, 128)
    source = opaque(engine, kernel, HEADS)
    planner = Planner(source.layout, source.layout)
    with pytest.raises(PlanError, match="begin inside an element"):
        planner.copies([3], [5], 5, 20)
    config, cache_config, caches = allocate(engine, full(size=128), CPUAttentionBackend)
    isa = Attention(32, 128).isa
    foreign = "vec" if isa == "amx" else "amx"
    told = {name: layer_of(CPUAttentionBackend, isa=foreign) for name in caches}
    config.compilation_config.static_forward_context = told
    elsewhere = described.describe(config, cache_config, caches)
    assert {region.format for region in elsewhere.regions} == {
        region.format.replace(f"/{isa}/", f"/{foreign}/").replace("head=64/cell=256", "head=32/cell=128")
        for region in source.layout.regions
    }
    same = described.describe(*allocate(engine, full(size=128), CPUAttentionBackend))
    with pytest.raises(PlanError, match="format"):
        Planner(same, elsewhere)
    with pytest.raises(PlanError, match="16384 bytes a head"):
        Planner(same, rank(engine, full(size=64), CPUAttentionBackend).layout)


def test_opaque_pages_of_several_groups(engine: Any) -> None:
    """Windows of opaque pages are moved whole: each begins at the start of a page (see `BlockTables.handed`)."""
    source, target = (rank(engine, hybrid(32), CPUAttentionBackend, blocks=n) for n in (40, 30))
    tables, before = BlockTables(source.cache_config), target.storage().clone()
    tokens, theirs, ours = 71, ([1, 2, 3], [0, 4, 5], [0, 6, 7]), ([9, 8, 7], [0, 5, 4], [0, 3, 2])
    planner = Planner(source.layout, target.layout)
    run(planner.copies(tables.pages(theirs, 0, tokens), tables.pages(ours, 0, tokens), 0, tokens))
    for name, pages in tables.windows(theirs, tokens).items():
        start = source.layout.window_start(name, tokens)
        run(planner.copies(pages, tables.windows(ours, tokens)[name], start, tokens, group=name))
    for number, group in enumerate(source.cache_config.kv_cache_groups):
        for name, page in product(group.layer_names, range(1 if number else 0, 3)):
            found, wanted = target.caches[name][ours[number][page]], source.caches[name][theirs[number][page]]
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))  # random bytes: some are NaN
    moved = (target.storage() != before).reshape(2, 30, -1).any(0).any(1)  # two layers of each group, 30 blocks
    assert moved.nonzero().flatten().tolist() == [2, 3, 4, 5, 7, 8, 9]


def test_opaque_pages_that_the_kernel_splits(engine: Any) -> None:
    indexer = {name_of(0): mla(dtype=torch.uint8, head_size=132, cache_role=SparseCacheRole.INDEXER)}
    source = rank(engine, indexer, "DEEPSEEK_V32_INDEXER", kernel=32)
    (region,) = source.layout.regions
    assert (region.pages, region.page_tokens, region.span, region.head_bytes) == (12, 64, 64, 64 * 132)
    target = rank(engine, indexer, "DEEPSEEK_V32_INDEXER", kernel=32)
    run(Planner(source.layout, target.layout).copies([3, 9], [7, 1], 0, 100))
    found, wanted = target.caches[name_of(0)], source.caches[name_of(0)]
    assert torch.equal(found[[14, 15, 2, 3]], wanted[[6, 7, 18, 19]])
    with pytest.raises(ConfigurationError, match=r"CPU_ATTN.*do not follow each other; set --block-size 32"):
        described.describe(*allocate(engine, full(size=64), CPUAttentionBackend, kernel=32))
    with pytest.raises(ConfigurationError, match="does not keep the page of a head contiguous"):
        described.describe(*allocate(engine, full(size=64), CPUAttentionBackend, order="LBNHC"))

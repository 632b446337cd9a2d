"""The layout of vLLM's own caches: copies along it put every byte and head into the right place."""

from __future__ import annotations

import copy
import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import (
    HEADS,
    LAYERS,
    allocate,
    engine_config,
    expected,
    full,
    hand_over,
    hybrid,
    layer_of,
    mla,
    name_of,
    rank,
    run,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVQuantMode,
    SparseCacheRole,
)

from kvroom.adapters.vllm import layout as described
from kvroom.adapters.vllm.blocks import BlockTables
from kvroom.errors import ConfigurationError
from kvroom.plan import Parallel, Place, Planner


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine_config(tmp_path_factory.mktemp("model"))


ORDERS = [order.name for order in KVCacheLayout]


@pytest.mark.parametrize(("one", "other"), list(product(ORDERS, ["LBHNC", "LBNHC", "BLNHC", "BHLNC"])))
def test_every_order_of_memory_into_every_other(engine: Any, one: str, other: str) -> None:
    source = rank(engine, full(), "FLASH_ATTN", order=one)
    target = rank(engine, full(size=32), "FLASHINFER", order=other, blocks=7)
    theirs, ours = [3, 9, 1, 11, 4], [5, 2, 6]
    wanted = expected([(source, theirs)], target, ours, 5, 71)
    hand_over([(source, theirs)], target, ours, 5, 71)
    assert torch.equal(target.storage(), wanted)


@pytest.mark.parametrize(("ranks", "into"), [(1, 2), (2, 1), (4, 2), (2, 4), (8, 2), (8, 1)])
def test_tensor_parallel_ranks_by_head(engine: Any, ranks: int, into: int) -> None:
    """4 heads on 8 ranks: two neighbouring ranks hold the same head, with the same bytes."""
    sources = [
        (rank(engine, full(max(1, HEADS // ranks)), "TRITON_ATTN", tp=ranks, tp_rank=r, order="LBNHC"), [4, 1, 7])
        for r in range(ranks)
    ]
    for one, (source, _) in enumerate(sources):
        twin = sources[one * HEADS // ranks * ranks // HEADS][0] if ranks > HEADS else source
        source.storage()[:] = twin.storage()
    parallel = Parallel(tp=ranks, kv_heads=HEADS)
    for r, (source, _) in enumerate(sources):
        assert {region.head_range for region in source.layout.regions} == {parallel.heads(r)}
    for r in range(into):
        target = rank(engine, full(HEADS // into), "FLASH_ATTN", tp=into, tp_rank=r, order="LBHNC")
        wanted = expected(sources, target, [2, 8, 3], 0, 45)
        hand_over(sources, target, [2, 8, 3], 0, 45)
        assert torch.equal(target.storage(), wanted)


def test_keys_and_values_of_unequal_size(engine: Any) -> None:
    source = rank(engine, full(head_size_v=16), "TRITON_ATTN_DIFFKV")
    target = rank(engine, full(head_size_v=16), "FLASH_ATTN_DIFFKV", order="BLNHC")
    sizes = {(region.component, region.head_bytes) for region in source.layout.regions}
    assert sizes == {("k", 64), ("v", 32)}
    wanted = expected([(source, [3, 4])], target, [9, 1], 0, 32)
    hand_over([(source, [3, 4])], target, [9, 1], 0, 32)
    assert torch.equal(target.storage(), wanted)


def test_blocks_that_the_kernel_splits(engine: Any) -> None:
    """Blocks of 64 tokens registered as blocks of 16: page numbers are vLLM's if a block's tokens are contiguous."""
    source = rank(engine, full(size=64), "FLASHINFER", order="LBNHC", kernel=16)
    whole = rank(engine, full(size=64), "FLASHINFER", order="LBNHC")
    assert next(iter(source.caches.values())).shape == (48, HEADS, 16, 64)
    assert (source.layout.page_tokens, source.layout.pages) == (64, 12)
    whole.storage()[:] = source.storage()
    target = rank(engine, full(size=16), "FLASH_ATTN", order="LBHNC", blocks=20)
    ours = [9, 2, 14, 11, 19, 6]
    wanted = expected([(whole, [3, 10])], target, ours, 7, 90)
    hand_over([(source, [3, 10])], target, ours, 7, 90)
    assert torch.equal(target.storage(), wanted)
    config, cache_config, caches = allocate(engine, full(size=64), "FLASHINFER", order="LBHNC", kernel=16)
    with pytest.raises(ConfigurationError, match=r"layers\.0\..*FLASHINFER.*\(48, 4, 16, 64\).*--block-size 16"):
        described.describe(config, cache_config, caches)


def test_latents(engine: Any) -> None:
    specs = {name_of(layer): mla() for layer in range(LAYERS)}
    source = rank(engine, specs, "FLASHMLA", tp=8, tp_rank=5, kernel=32)
    target = rank(engine, {name: mla(16) for name in specs}, "TRITON_MLA", order="BLHNC", blocks=30)
    assert {(r.component, r.head_range, r.head_bytes, r.format) for r in source.layout.regions} == {
        ("latent", (0, 1), 96, "")
    }
    whole = rank(engine, specs, "FLASHMLA")
    whole.storage()[:] = source.storage()
    ours = list(range(9, 0, -1))
    wanted = expected([(whole, [3, 10])], target, ours, 0, 128)
    hand_over([(source, [3, 10])], target, ours, 0, 128)
    assert torch.equal(target.storage(), wanted)


def test_packed_latents_and_indexers_move_whole(engine: Any) -> None:
    indexer = mla(dtype=torch.uint8, head_size=132, cache_role=SparseCacheRole.INDEXER)
    packed = mla(state_content_bytes=656, cache_dtype_str="fp8_ds_mla", dtype=torch.uint8)
    specs = {name: spec for i in range(2) for name, spec in
             ((name_of(i), packed), (f"model.layers.{i}.self_attn.indexer.k_cache", indexer))}  # fmt: skip
    source = rank(engine, specs, "FLASHMLA_SPARSE", order="BLHNC")
    target = rank(engine, specs, "FLASHMLA_SPARSE", order="BLHNC", blocks=5)
    kinds = {(r.layer, r.component, r.span, r.head_bytes) for r in source.layout.regions}
    assert kinds == {(i, *kind) for i in (0, 1) for kind in (("latent", 64, 656 * 64), ("indexer", 64, 132 * 64))}
    wanted = expected([(source, [3, 10])], target, [2, 4], 0, 128)
    hand_over([(source, [3, 10])], target, [2, 4], 0, 128)
    assert torch.equal(target.storage(), wanted)


def test_cells_with_scales(engine: Any) -> None:
    engine = copy.deepcopy(engine)
    engine.cache_config.cache_dtype = "int8_per_token_head"
    more = {"kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD, "state_content_bytes": 72}
    spec = FullAttentionSpec(block_size=16, num_kv_heads=HEADS, head_size=32, dtype=torch.int8, **more)
    specs = {name_of(layer): spec for layer in range(LAYERS)}
    source, target = (rank(engine, specs, "TRITON_ATTN", order=order) for order in ("LBNHC", "BLHNC"))
    assert source.layout.dtype == "int8_per_token_head of bfloat16"
    wanted = expected([(source, [3, 10])], target, [2, 4], 3, 30)
    hand_over([(source, [3, 10])], target, [2, 4], 3, 30)
    assert torch.equal(target.storage(), wanted)


def test_groups_that_share_one_pool(engine: Any) -> None:
    source = rank(engine, hybrid(), "FLASH_ATTN", order="LBNHC", blocks=40)
    target = rank(engine, hybrid(), "FLASH_ATTN", order="LBNHC", blocks=30)
    tables = BlockTables(source.cache_config)
    assert {(g.name, g.window) for g in tables.groups} == {("", 0), ("window.1", 19), ("window.2", 19)}
    assert len(source.layout.memory()) == 1
    tokens, rng = tables.handed(60), random.Random(3)
    theirs, ours = (
        [rng.sample(range(1, n), 12)[4 * i : 4 * i + 4] for i in range(3)] for n in (40, 30)
    )  # fmt: skip
    for ids in (theirs, ours):
        ids[1][:2] = ids[2][:2] = [0, 0]  # before the window
    wanted = target.storage().clone()
    for number, group in enumerate(source.cache_config.kv_cache_groups):
        first = max(0, tokens - tables.groups[number].window) if number else 0
        for name, token in product(group.layer_names, range(first, tokens)):
            into = target.caches[name]
            row = source.caches[name][theirs[number][token // 16], :, token % 16].contiguous().view(torch.uint8)
            place = into[ours[number][token // 16], :, token % 16]
            for head in range(HEADS):
                at = place[head].data_ptr() - target.storage().data_ptr()
                wanted[at : at + 128] = row[head]
    planner = Planner(source.layout, target.layout)
    run(planner.copies(tables.pages(theirs, 0, tokens), tables.pages(ours, 0, tokens), 0, tokens))
    for name, pages in tables.windows(theirs, tokens).items():
        start = source.layout.window_start(name, tokens)
        run(planner.copies(pages, tables.windows(ours, tokens)[name], start, tokens, group=name))
    assert torch.equal(target.storage(), wanted)


def test_layers_that_share_a_cache_add_nothing(engine: Any) -> None:
    shared = name_of(LAYERS)
    rest = {shared: layer_of("FLASH_ATTN", kv_sharing_target_layer_name=name_of(1))}
    config, cache_config, caches = allocate(engine, full(), "FLASH_ATTN", rest=rest)
    caches[shared] = caches[name_of(1)]
    once = described.describe(config, cache_config, caches)
    assert {region.layer for region in once.regions} == set(range(LAYERS))
    cache_config.kv_cache_groups[0].layer_names.append(shared)  # as the model runner does in its own copy
    assert described.describe(config, cache_config, caches) == once
    caches["model.layers.7.strange"] = torch.zeros_like(caches[shared])
    with pytest.raises(ConfigurationError, match=r"layers \['model.layers.7.strange'\] are in no KV cache group"):
        described.describe(config, cache_config, caches)
    del caches[name_of(2)]
    with pytest.raises(ConfigurationError, match=r"layers\.2\..* has no tensor among"):
        described.describe(config, cache_config, caches)


def test_layers_are_numbered_in_the_whole_model() -> None:
    assert described.layer_index("model.layers.17.self_attn.attn") == 17
    assert described.layer_index("model.layers.3.self_attn.1.attn") == 3
    assert described.layer_index("language_model.model.layers.3.self_attn.indexer.k_cache") == 3
    with pytest.raises(ConfigurationError, match=r"mtp\.attn has no number"):
        described.layer_index("mtp.attn")


@pytest.mark.parametrize(
    ("backend", "more", "said"),
    [
        ("ROCM_ATTN", {}, "ROCM_ATTN: .*FullAttentionSpec comes from a backend"),
        ("FLASHINFER", {"num_head_slots": 8, "state_content_bytes": 20}, "packs its heads"),
        ("TURBOQUANT", {"state_content_bytes": 40}, "comes from a backend"),
        ("FLASH_ATTN", {"state_content_bytes": 40}, "comes from a backend"),
        ("FLASH_ATTN", {"tokens_per_state": 4}, "packs its heads or tokens"),
    ],
)
def test_unknown_pages_are_refused(engine: Any, backend: str, more: dict[str, Any], said: str) -> None:
    made = allocate(engine, full(**more), backend)
    with pytest.raises(ConfigurationError, match=rf"layer model\.layers\.0\..*{said}.*; serve the model"):
        described.describe(*made)


def test_tensors_that_are_not_as_expected_are_refused(engine: Any) -> None:
    config, cache_config, caches = allocate(engine, full(), "FLASH_ATTN")
    name = name_of(0)
    good = caches[name]
    strange = {
        "is not \\[blocks, heads, tokens, content\\]": good[0],
        "content of one token and head contiguous": good.transpose(2, 3),
        "does not hold vLLM's 12 blocks of 16 tokens": good[:5],
        "does not hold 64 bytes of K and 64 of V": good[..., :60],
    }
    for said, tensor in strange.items():
        caches[name] = tensor
        with pytest.raises(ConfigurationError, match=said):
            described.describe(config, cache_config, caches)
    caches[name] = caches[name_of(1)]
    with pytest.raises(ConfigurationError, match=r"do not form a layout: .*share memory"):
        described.describe(config, cache_config, caches)
    config, cache_config, caches = allocate(engine, {name: mla(16)}, "FLASHMLA")
    caches[name] = caches[name].unflatten(3, (2, 24)).squeeze(1).transpose(1, 2)
    with pytest.raises(ConfigurationError, match="has several heads, but MLA has one latent"):
        described.describe(config, cache_config, caches)


def test_two_caches_of_one_kind_in_a_layer_are_refused(engine: Any) -> None:
    spec = full()[name_of(0)]
    specs = {"model.layers.3.self_attn.0.attn": spec, "model.layers.3.self_attn.1.attn": spec}
    with pytest.raises(ConfigurationError, match=r"layer 3 'k'.*declare the same heads"):
        described.describe(*allocate(engine, specs, "FLASH_ATTN"))


def test_heads_that_cannot_be_placed_are_refused(engine: Any) -> None:
    made = allocate(engine, full(heads=3), "FLASH_ATTN", tp=2)
    with pytest.raises(ConfigurationError, match="3 KV heads on each of 2 tensor parallel ranks, and 4 in the model"):
        described.describe(*made, Place(0, 0, 1, 0))


def test_layers_with_other_heads_than_the_model(engine: Any) -> None:
    """Layers may differ in heads. A draft model's layers, which follow the model's, have its heads: 2 here, not 4."""
    specs = full(2, layers=(0, 1)) | full(1, layers=(2, LAYERS))
    config, cache_config, caches = allocate(engine, specs, "FLASH_ATTN", tp=2, order="LBHNC")
    few = [{}, {}, {"total_num_kv_heads": 1}, {}]
    config.model_config.model_arch_config.per_layer_overrides = few
    draft = SimpleNamespace(get_total_num_kv_heads=lambda: 2)
    config.speculative_config = SimpleNamespace(draft_model_config=draft)
    layout = described.describe(config, cache_config, caches, Place(0, 0, 1, 0))
    found = {region.layer: region.head_range for region in layout.regions}
    assert found == {0: (2, 4), 1: (2, 4), 2: (0, 1), LAYERS: (1, 2)}


def test_every_named_backend_is_one_of_vllm() -> None:
    named = described._KEY_VALUE | described._LATENT
    assert named <= set(AttentionBackendEnum.__members__)


def test_fingerprints(engine: Any) -> None:
    mine = described.fingerprint(engine)
    assert mine.startswith("LlamaForCausalLM/")
    moved = copy.deepcopy(engine)
    moved.model_config.model = "/elsewhere"
    assert described.fingerprint(moved) == mine
    for name, value in (("rope_parameters", {"rope_theta": 5e5}), ("rms_norm_eps", 1e-6), ("sliding_window", 9)):
        other = copy.deepcopy(engine)
        setattr(other.model_config.hf_text_config, name, value)
        assert described.fingerprint(other) != mine
    for name, value in (("total_num_kv_heads", 8), ("head_size", 64), ("total_num_hidden_layers", 5)):
        other = copy.deepcopy(engine)
        setattr(other.model_config.model_arch_config, name, value)
        assert described.fingerprint(other) != mine


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("auto", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("fp8", "float8_e4m3fn of bfloat16"),
        ("fp8_e4m3", "float8_e4m3fn of bfloat16"),
        ("fp8_e5m2", "fp8_e5m2 of bfloat16"),
    ],
)
def test_cache_types(engine: Any, kind: str, said: str) -> None:
    engine = copy.deepcopy(engine)
    engine.cache_config.cache_dtype = kind
    assert rank(engine, full(), "FLASH_ATTN").layout.dtype == said


def test_ranks(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(engine)
    assert described.parallel(config) == Parallel(kv_heads=HEADS)
    assert described.place(config) == Place(0, 0, 0, 0)
    config.parallel_config.tensor_parallel_size, config.parallel_config.pipeline_parallel_size = 2, 3
    config.parallel_config.data_parallel_size, config.parallel_config.data_parallel_rank = 4, 3
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_pp_group", lambda: SimpleNamespace(rank_in_group=2))
    assert described.place(config) == Place(0, 0, 1, 2)
    assert described.parallel(config) == Parallel(tp=2, pp=3, stages=(1, 2, 1), kv_heads=HEADS)
    latent = SimpleNamespace(parallel_config=config.parallel_config, model_config=SimpleNamespace(use_mla=True))
    latent.parallel_config.pipeline_parallel_size = 1
    assert described.parallel(latent) == Parallel(tp=2, kv_heads=0)
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        split = copy.deepcopy(engine)
        setattr(split.parallel_config, name, 2)
        for refused in (lambda: described.parallel(split), lambda: rank(split, full(), "FLASH_ATTN")):  # noqa: B023
            with pytest.raises(ConfigurationError, match=f"{name} is 2"):
                refused()


def test_a_stage_without_layers_of_a_group(engine: Any) -> None:
    """A pipeline stage has all groups of the model, but may have no layer in one of them."""
    config, cache_config, caches = allocate(engine, hybrid(), "FLASH_ATTN")
    for name in cache_config.kv_cache_groups[2].layer_names:
        del caches[name]
    cache_config.kv_cache_groups[2].layer_names = []
    layout = described.describe(config, cache_config, caches)
    assert {region.group for region in layout.regions} == {"", "window.1"}
    assert [group.name for group in layout.groups] == ["window.1", "window.2"]

"""The paged forward call compared with transformers: same weights, same prompts, same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cache,
    DeepseekV3Config,
    Gemma2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
)

from kvroom.engine.attention import NAME
from kvroom.engine.lease import Lease
from kvroom.engine.model import forward
from kvroom.engine.pool import PagedPool
from kvroom.engine.shape import CacheShape, KVShape, StateShape, cache_parameter, probe
from kvroom.errors import ConfigurationError

from .tiny import ALL_SLIDING, CONFIGS, SIZES, SLIDING, STATEFUL, WINDOW, Tiny, prompt, tiny

DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MLA = {
    **{name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(scope="module", params=sorted({**CONFIGS, **SLIDING, **STATEFUL, **ALL_SLIDING}))
def model(request: pytest.FixtureRequest) -> Tiny:
    return tiny(request.param)


def make_pool(model: Tiny, *, pages: int = 64, page_tokens: int = 8, chunk: int = 64) -> PagedPool:
    """Return a pool for four requests, filled with NaN, so that a read of an unwritten element shows."""
    loaded = model.loaded
    pool = PagedPool(
        loaded.shape, pages=pages, page_tokens=page_tokens, dtype=loaded.dtype, slots=4, chunk_tokens=chunk
    )
    fill(pool, float("nan"))
    return pool


def fill(pool: PagedPool, value: float) -> None:
    pool.data.fill_(value)
    if pool.sliding is not None:
        pool.sliding.data.fill_(value)
    if pool.states is not None:
        pool.states.rows.view(torch.float32).fill_(value)


def take(pool: PagedPool, tokens: int) -> Lease:
    lease = Lease(pool)
    assert lease.take(tokens)
    return lease


def greedy(model: Tiny, pool: PagedPool, ids: tuple[int, ...], count: int, chunk: int) -> list[int]:
    lease = take(pool, len(ids) + count)
    for start in range(0, len(ids), chunk):
        logits = forward(model.loaded, pool, [lease.chunk(ids[start : start + chunk], start)])
    tokens = [int(logits[0].argmax())]
    while len(tokens) < count:
        position = len(ids) + len(tokens) - 1
        logits = forward(model.loaded, pool, [lease.chunk(tokens[-1:], position)])
        tokens.append(int(logits[0].argmax()))
    lease.drop()
    return tokens


def upto_eos(tokens: list[int], like: list[int]) -> list[int]:
    return tokens[: len(like)]


@pytest.mark.parametrize(("page_tokens", "chunk"), [(1, 1), (8, 7), (8, 16), (5, 64), (64, 13)])
def test_chunks_and_pages_of_any_size_give_the_tokens_of_transformers(
    model: Tiny, page_tokens: int, chunk: int
) -> None:
    pool = make_pool(model, pages=-(-256 // page_tokens), page_tokens=page_tokens, chunk=chunk)
    for length in (1, 8, 9, 40):
        expected = model.generate(prompt(length), 16)
        assert upto_eos(greedy(model, pool, prompt(length), 16, chunk), expected) == expected
    pool.check_idle()


def test_sequences_of_different_lengths_in_one_call_equal_each_alone(model: Tiny) -> None:
    pool = make_pool(model)
    prompts = [prompt(length, seed=length) for length in (1, 23, 8, 60)]
    leases = [take(pool, len(ids) + 1) for ids in prompts]
    together = forward(model.loaded, pool, [own.chunk(ids, 0) for ids, own in zip(prompts, leases, strict=True)])
    for ids, row in zip(prompts, together, strict=True):
        torch.testing.assert_close(row, logits_of(model, ids), rtol=1e-4, atol=1e-4)
    # One prompt starts again and stops in the middle; its next chunk runs while the others decode.
    forward(model.loaded, pool, [leases[1].chunk(prompts[1][:11], 0)])
    mixed = [leases[0].chunk((5,), 1), leases[1].chunk(prompts[1][11:], 11), leases[2].chunk((7,), 8)]
    rows = forward(model.loaded, pool, mixed)
    for row, ids in zip(rows, ((*prompts[0], 5), prompts[1], (*prompts[2], 7)), strict=True):
        torch.testing.assert_close(row, logits_of(model, ids), rtol=1e-4, atol=1e-4)


def logits_of(model: Tiny, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.reference(torch.tensor([ids])).logits[0, -1]
    return logits


def test_no_page_and_no_slot_but_its_own_is_written(model: Tiny) -> None:
    pool = make_pool(model, chunk=18)
    fill(pool, 3.0)
    others = take(pool, 8)
    own = take(pool, 18)
    forward(model.loaded, pool, [own.chunk(prompt(18), 0)])
    untouched = [page for page in range(pool.pages) if page not in own.pages]
    assert set(others.pages) < set(untouched)
    assert bool((pool.data[:, :, untouched] == 3.0).all())
    assert bool((pool.data[:, :, own.pages[2], 2:] == 3.0).all())
    assert bool((pool.data[:, :, own.pages[:2]] != 3.0).all())
    if pool.sliding is not None:
        ring = own.windows(18)["swa"]
        untouched = [page for page in range(pool.sliding.data.shape[2]) if page not in ring]
        assert bool((pool.sliding.data[:, :, untouched] == 3.0).all())
        assert bool((pool.sliding.data[:, :, ring[:2]] != 3.0).all())
    if pool.states is not None:
        (slot,) = own.windows(18)["state"]
        written = (pool.states.rows.view(torch.float32) != 3.0).any(dim=1)
        assert written.tolist() == [row == slot for row in range(4)]


ALL = KVShape(layers=(0, 1, 2), kv_heads=2, head_dim=8)
ONE = KVShape(layers=(1,), kv_heads=2, head_dim=8)


@pytest.mark.parametrize("kind", sorted({**CONFIGS, **ALL_SLIDING}))
def test_the_probe_learns_what_attention_keeps(kind: str) -> None:
    assert tiny(kind).loaded.shape == CacheShape(ALL)


@pytest.mark.parametrize("kind", sorted(SLIDING))
def test_the_probe_learns_which_layers_have_a_window(kind: str) -> None:
    assert tiny(kind).loaded.shape == CacheShape(ONE, KVShape((0, 2), 2, 8), WINDOW)


def test_the_probe_learns_the_states_of_each_layer() -> None:
    conv, wide = (48, 3), (64, 4)
    assert tiny("lfm2").loaded.shape == CacheShape(
        ONE, states=tuple(StateShape(layer, "conv1", conv, torch.float32) for layer in (0, 2))
    )
    assert tiny("qwen3-next").loaded.shape.states == tuple(
        StateShape(layer, component, sizes, torch.float32)
        for layer in (0, 2)
        for component, sizes in (("conv1", wide), ("recurrent1", (4, 8, 8)))
    )
    assert tiny("falcon-h1").loaded.shape.full == ALL
    assert [state.layer for state in tiny("falcon-h1").loaded.shape.states] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Gemma2Config(query_pre_attn_scalar=8, **SIZES), "'gemma2'.*softcap"),
        (JambaConfig(attn_layer_period=2, attn_layer_offset=1, num_experts=1, **SIZES), "'jamba'.*loses its states"),
        (Llama4TextConfig(layer_types=["chunked_attention"] * 3, **SIZES), "'llama4_text'.*types chunked_attention"),
        (LlamaConfig(rope_parameters=DYNAMIC_ROPE, **SIZES), "'llama'.*rope type 'dynamic'"),
        (BloomConfig(n_head=4, n_layer=2, hidden_size=48, vocab_size=257), "'bloom'.*do not all keep"),
        (DeepseekV3Config(**MLA), "'deepseek_v3'.*differ in head dimension"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_with_another_kind_of_attention_is_refused_by_name(config: Any, named: str) -> None:
    network = AutoModelForCausalLM.from_config(config, attn_implementation=NAME if named[1] != "b" else "eager")
    with pytest.raises(ConfigurationError, match=named):
        probe(network)


def test_a_transformers_that_keeps_states_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("lfm2").reference
    monkeypatch.delattr(Cache, "get_conv_state")
    with pytest.raises(ConfigurationError, match=r"'lfm2'.*is too old: upgrade it"):
        probe(network)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_given_by_the_name_that_the_model_has_for_it(name: str) -> None:
    class Old:
        def forward(self, *, past_key_values: object) -> None: ...

    class New:
        def forward(self, *, cache: object, **more: object) -> None: ...

    assert cache_parameter(New() if name == "cache" else Old()) == name


def test_models_with_other_weights_have_other_fingerprints() -> None:
    assert tiny(seed=1).loaded.fingerprint == tiny(seed=1).loaded.fingerprint
    assert tiny(seed=1).loaded.fingerprint != tiny(seed=2).loaded.fingerprint

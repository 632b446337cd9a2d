"""The paged forward call against transformers: same weights, same prompts, same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
)

from kvroom.engine.attention import NAME, Chunk, KVShape, probe
from kvroom.engine.model import forward
from kvroom.engine.pool import PagedPool
from kvroom.errors import ConfigurationError

from .tiny import CONFIGS, SIZES, Tiny, prompt, tiny

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


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> Tiny:
    return tiny(request.param)


def make_pool(model: Tiny, *, pages: int = 64, page_tokens: int = 8) -> PagedPool:
    loaded = model.loaded
    return PagedPool(loaded.shape, pages=pages, page_tokens=page_tokens, dtype=loaded.dtype, device=loaded.device)


def greedy(model: Tiny, pool: PagedPool, ids: tuple[int, ...], count: int, chunk: int) -> list[int]:
    pages = pool.allocate(pool.pages_for(len(ids) + count))
    assert pages is not None
    for start in range(0, len(ids), chunk):
        logits = forward(model.loaded, pool, [Chunk(ids[start : start + chunk], start, pages)])
    tokens = [int(logits[0].argmax())]
    while len(tokens) < count:
        position = len(ids) + len(tokens) - 1
        logits = forward(model.loaded, pool, [Chunk(tokens[-1:], position, pages)])
        tokens.append(int(logits[0].argmax()))
    pool.release(pages)
    return tokens


def upto_eos(tokens: list[int], like: list[int]) -> list[int]:
    return tokens[: len(like)]


@pytest.mark.parametrize(("page_tokens", "chunk"), [(1, 1), (8, 7), (8, 16), (5, 64), (64, 13)])
def test_chunks_and_pages_of_any_size_give_the_tokens_of_transformers(
    model: Tiny, page_tokens: int, chunk: int
) -> None:
    pool = make_pool(model, pages=-(-256 // page_tokens), page_tokens=page_tokens)
    for length in (1, 7, 8, 9, 40):
        expected = model.generate(prompt(length), 12)
        assert upto_eos(greedy(model, pool, prompt(length), 12, chunk), expected) == expected
    pool.check_idle()


def test_sequences_of_different_lengths_in_one_call_equal_each_alone(model: Tiny) -> None:
    pool = make_pool(model)
    prompts = [prompt(length, seed=length) for length in (1, 23, 8, 60)]
    pages = [pool.allocate(pool.pages_for(len(ids) + 1)) or () for ids in prompts]
    together = forward(model.loaded, pool, [Chunk(ids, 0, own) for ids, own in zip(prompts, pages, strict=True)])
    for ids, row in zip(prompts, together, strict=True):
        with torch.inference_mode():
            alone = model.reference(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    # One prompt goes on in a chunk while the others decode.
    mixed = [Chunk((5,), 1, pages[0]), Chunk(prompts[1][11:], 11, pages[1]), Chunk((7,), 8, pages[2])]
    rows = forward(model.loaded, pool, mixed)
    torch.testing.assert_close(rows[1], together[1], rtol=1e-4, atol=1e-4)


def test_what_earlier_requests_left_in_a_page_does_not_matter(model: Tiny) -> None:
    pool = make_pool(model)
    pool.data.fill_(float("nan"))
    expected = model.generate(prompt(13), 8)
    assert upto_eos(greedy(model, pool, prompt(13), 8, 5), expected) == expected


def test_no_page_but_its_own_is_written(model: Tiny) -> None:
    pool = make_pool(model)
    pool.data.fill_(3.0)
    pages = (5, 2, 60)
    forward(model.loaded, pool, [Chunk(prompt(18), 0, pages)])
    untouched = [page for page in range(pool.pages) if page not in pages]
    assert bool((pool.data[:, :, untouched] == 3.0).all())
    assert bool((pool.data[:, :, 60, 2:] == 3.0).all())
    assert bool((pool.data[:, :, [5, 2]] != 3.0).all())


def test_the_probe_learns_what_the_model_keeps(model: Tiny) -> None:
    assert model.loaded.shape == KVShape(layers=3, kv_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MistralConfig(sliding_window=16, **SIZES), "'mistral'.*sliding_window"),
        (Gemma2Config(query_pre_attn_scalar=8, **SIZES), "'gemma2'.*layer types sliding_attention"),
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


def test_models_with_other_weights_have_other_fingerprints() -> None:
    assert tiny(seed=1).loaded.fingerprint == tiny(seed=1).loaded.fingerprint
    assert tiny(seed=1).loaded.fingerprint != tiny(seed=2).loaded.fingerprint

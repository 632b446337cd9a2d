"""Layouts of SGLang's pools: a plan moves exactly the bytes of the tokens, and unsupported pools are refused."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helpers import kv_args, model_config, new_buffers, new_pool, server_args

from kvroom.adapters.sglang.layout import describe, fingerprint
from kvroom.errors import ConfigurationError, PlanError
from kvroom.plan import KVLayout, Planner

with_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2])


def layout(pool: Any, **others: Any) -> KVLayout:
    return describe(kv_args(pool, new_buffers(), **others), device="cpu", model="m", latent=False)


def contents(pool: Any, slots: list[int]) -> list[torch.Tensor]:
    """Return the bytes of these slots as SGLang passes them to its attention: K and V of each layer."""
    buffers = [buffer for layer in range(pool.layer_num) for buffer in pool.get_kv_buffer(layer)]
    return [buffer[torch.tensor(slots)].contiguous().view(torch.uint8).clone() for buffer in buffers]


def randomize(pool: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in range(pool.layer_num):
        for buffer in pool.get_kv_buffer(layer):
            raw = buffer.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, generator=draw, dtype=torch.uint8))


def slots_of(pages: list[int], page_size: int, start: int, stop: int) -> list[int]:
    """Return the slots of tokens [start, stop) if `pages[0]` holds token 0."""
    return [pages[token // page_size] * page_size + token % page_size for token in range(start, stop)]


def test_a_layout_has_the_numbers_of_the_pool() -> None:
    pool = new_pool(pages=7, page_size=16, layers=3, heads=2)
    made = layout(pool)
    assert (made.pages, made.page_tokens, len(made.regions)) == (8, 16, 6)
    assert [(region.layer, region.component) for region in made.regions] == [
        (0, "k"), (1, "k"), (2, "k"), (0, "v"), (1, "v"), (2, "v"),
    ]  # fmt: skip
    assert [region.base for region in made.regions] == [buffer.data_ptr() for buffer in pool.k_buffer + pool.v_buffer]
    assert {region.device for region in made.regions} == {"cpu"}
    assert made.dtype == "torch.bfloat16"


@with_dtypes
@pytest.mark.parametrize(("source_page", "sink_page"), [(1, 1), (16, 16), (64, 64), (64, 1), (1, 16), (16, 64)])
def test_bytes_that_a_plan_moves_are_those_of_the_tokens(dtype: torch.dtype, source_page: int, sink_page: int) -> None:
    tokens, prefix = 77, sink_page
    pages = {page: -(-tokens // page) for page in (source_page, sink_page)}
    source, sink = (new_pool(pages[page] + 3, page, 3, dtype, heads=3) for page in (source_page, sink_page))
    randomize(source, 1)
    randomize(sink, 2)
    source_pages = list(range(2, 2 + pages[source_page]))[::-1]
    sink_pages = list(range(1, 1 + pages[sink_page]))
    wanted = contents(source, slots_of(source_pages, source_page, prefix, tokens))
    written = slots_of(sink_pages, sink_page, prefix, tokens)
    untouched = sorted(set(range(sink.size + sink_page)) - set(written))
    before = contents(sink, untouched)
    first = prefix // source_page
    blocks = Planner(layout(source), layout(sink)).copies(
        source_pages[first:], sink_pages[1:], prefix, tokens, source_start=first * source_page
    )
    for src, dst, length in zip(blocks.src.tolist(), blocks.dst.tolist(), blocks.length.tolist(), strict=True):
        ctypes.memmove(dst, src, length)
    assert all(map(torch.equal, contents(sink, written), wanted))
    assert all(map(torch.equal, contents(sink, untouched), before))


@pytest.mark.parametrize(("other", "words"), [({"dtype": torch.float16}, "float16"), ({"heads": 4}, "bytes")])
def test_pools_that_differ_are_not_copied(other: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Planner(layout(new_pool(pages=2)), layout(new_pool(pages=2, **other)))


def test_layer_numbers_are_those_that_sglang_gives() -> None:
    made = layout(new_pool(pages=2, layers=2), kv_layer_ids=[3, 9, 3, 9])
    assert [(region.layer, region.component) for region in made.regions] == [(3, "k"), (9, "k"), (3, "v"), (9, "v")]


MAMBA = SimpleNamespace(value="mamba")
NOT_MAPPED: list[tuple[dict[str, Any], str]] = [
    ({"state_types": [MAMBA]}, r"states beside the KV cache \(mamba\)"),
    ({"num_draft_entries": 2}, "the KV cache of a draft model"),
    ({"kv_layout": "hybrid"}, "the cache layout 'hybrid'"),
    ({"num_draft_entries": 2, "kv_layout": "x"}, "the KV cache of a draft model and the cache layout 'x'"),
    ({"kv_data_ptrs": [], "kv_data_lens": [], "kv_item_lens": []}, "has 0 buffers, not one K and one V"),
    ({"kv_data_ptrs": [64] * 3, "kv_data_lens": [64] * 3, "kv_item_lens": [16] * 3}, "has 3 buffers, not one K"),
    ({"page_size": 7}, "buffer 0 of the KV pool has pages of 512 bytes for 7 tokens"),
]


@pytest.mark.parametrize(("others", "words"), NOT_MAPPED)
def test_unsupported_pools_are_refused_by_name(others: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as raised:
        layout(new_pool(pages=2), **others)
    assert "serve this model with another --disaggregation-transfer-backend" in str(raised.value)


def test_latents_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"does not hand over a cache of latents \(MLA\) yet"):
        describe(kv_args(new_pool(pages=2), new_buffers()), device="cpu", model="m", latent=True)


# -- the model's fingerprint -------------------------------------------------------------------------------------------


def edited(folder: Path, **fields: Any) -> Any:
    """Return SGLang's `ModelConfig` of the packaged model, from a copy of its configuration with other fields."""
    folder.mkdir()
    said = json.loads((Path(server_args("prefill").model_path) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))
    return model_config(folder)


def test_a_copy_of_a_model_has_its_fingerprint(tmp_path: Path) -> None:
    args = kv_args(new_pool(pages=1), new_buffers())
    ours = fingerprint(model_config(), args)
    theirs = fingerprint(edited(tmp_path / "elsewhere", _name_or_path="other", transformers_version="5.0"), args)
    assert ours == theirs
    assert ours.startswith("sglang/LlamaForCausalLM/")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"num_hidden_layers": 29},
        {"rms_norm_eps": 1e-6},
        {"num_key_value_heads": 9},
        {"head_dim": 32},
        {"vocab_size": 49153},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"intermediate_size": 1024},
        {"architectures": ["MistralForCausalLM"]},
    ],
)
def test_another_model_has_another_fingerprint(tmp_path: Path, fields: dict[str, Any]) -> None:
    args = kv_args(new_pool(pages=1), new_buffers())
    assert fingerprint(edited(tmp_path / "same"), args) != fingerprint(edited(tmp_path / "other", **fields), args)


def test_another_number_of_buffers_has_another_fingerprint() -> None:
    model = model_config()
    two, three = (kv_args(new_pool(pages=1, layers=layers), new_buffers()) for layers in (2, 3))
    assert fingerprint(model, two) != fingerprint(model, three)

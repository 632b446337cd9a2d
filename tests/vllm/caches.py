"""vLLM caches, allocated by vLLM's own code, and the oracle that computes their content after a hand-over.

The oracle indexes the tensors as vLLM's kernels do, by [block, head, token, content], and does not use strides.
"""

from __future__ import annotations

import copy
import ctypes
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.utils import allocate_kv_cache

from kvroom.adapters.vllm import layout as described
from kvroom.plan import Blocks, KVLayout, Place, Planner, shares

HEADS, LAYERS, BF16 = 4, 4, torch.bfloat16
CPU = torch.device("cpu")


def engine_config(folder: Path) -> Any:
    """Return vLLM's configuration of a small model: 4 layers, 8 query heads, 4 KV heads with 32 elements each."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": HEADS, "head_dim": 32, "num_hidden_layers": LAYERS,
        "vocab_size": 1000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    args = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, enforce_eager=True
    )
    return args.create_engine_config()


class Rank(NamedTuple):
    """One rank of an engine: vLLM's configurations, its caches, and their layout as the adapter describes it."""

    config: Any
    cache_config: Any
    caches: dict[str, Any]
    layout: KVLayout

    def storage(self) -> Any:
        """Return all bytes of the pool, uint8[n], as a view."""
        whole = next(iter(self.caches.values())).untyped_storage()
        return torch.frombuffer((ctypes.c_char * whole.nbytes()).from_address(whole.data_ptr()), dtype=torch.uint8)


def layer_of(backend: Any, **more: Any) -> Any:
    """Return a double of a model's layer, with the one method that the adapter calls."""
    named = backend if hasattr(backend, "get_name") else SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(get_attn_backend=lambda: named, **more)


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def allocate(
    engine: Any, specs: dict[str, Any], backend: Any, *, order: str = "LBHNC", blocks: int = 12, tp: int = 1,
    kernel: int | None = None, rest: dict[str, Any] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:  # fmt: skip
    """Group these layers and allocate their caches with vLLM's code. `kernel` is the attention kernel's block size."""
    config = copy.deepcopy(engine)
    config.parallel_config.tensor_parallel_size = tp
    config.cache_config.kv_cache_layout = order
    config.cache_config.num_gpu_blocks_override = blocks
    config.compilation_config.static_forward_context = {name: layer_of(backend) for name in specs} | (rest or {})
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    cache_config = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, 1 << 30)
    kernels = [kernel] * len(groups) if kernel else None
    caches = allocate_kv_cache(cache_config, CPU, KVCacheLayout[order], kernels)
    return config, cache_config, caches


def rank(engine: Any, specs: dict[str, Any], backend: Any, *, tp_rank: int = 0, **how: Any) -> Rank:
    config, cache_config, caches = allocate(engine, specs, backend, **how)
    layout = described.describe(config, cache_config, caches, Place(0, 0, tp_rank, 0))
    made = Rank(config, cache_config, caches, layout)
    made.storage()[:] = torch.randint(0, 256, (made.storage().numel(),), dtype=torch.uint8)
    return made


def full(heads: int = HEADS, size: int = 16, layers: Sequence[int] = range(LAYERS), **more: Any) -> dict[str, Any]:
    spec = FullAttentionSpec(block_size=size, num_kv_heads=heads, head_size=32, dtype=BF16, **more)
    return {name_of(layer): spec for layer in layers}


def run(blocks: Blocks) -> None:
    """Copy the blocks as a transport does."""
    for src, dst, length in zip(blocks.src.tolist(), blocks.dst.tolist(), blocks.length.tolist(), strict=True):
        ctypes.memmove(dst, src, length)


def hand_over(sources: Sequence[tuple[Rank, list[int]]], target: Rank, pages: list[int], start: int, stop: int) -> None:
    """Copy tokens [start, stop) of the main group from all source ranks. Each list has all blocks of a request."""
    parts = shares([one.layout for one, _ in sources], target.layout)
    for (source, theirs), some in zip(sources, parts, strict=True):
        had = theirs[start // source.layout.page_tokens : -(-stop // source.layout.page_tokens)]
        given = pages[start // target.layout.page_tokens : -(-stop // target.layout.page_tokens)]
        run(Planner(source.layout, target.layout, some).copies(had, given, start, stop))


def expected(sources: Sequence[tuple[Rank, list[int]]], target: Rank, pages: list[int], start: int, stop: int) -> Any:
    """Return the target's bytes after `hand_over`, computed token by token and head by head. No cache is changed."""
    before = target.storage().clone()
    for source, theirs in sources:
        for name, cache in source.caches.items():
            into, first = target.caches[name], head_of(source, name) - head_of(target, name)
            for token, head in product(range(start, stop), range(cache.shape[1])):
                at, to = divmod(token, cache.shape[2]), divmod(token, into.shape[2])
                if 0 <= first + head < into.shape[1]:
                    into[pages[to[0]], first + head, to[1]] = cache[theirs[at[0]], head, at[1]]
    after = target.storage().clone()
    target.storage()[:] = before
    return after


def head_of(one: Rank, name: str) -> int:
    """Return the index in the model of the first head of a layer on this rank."""
    layer = described.layer_index(name)
    return min(region.head_range[0] for region in one.layout.regions if region.layer == layer)


def mla(size: int = 64, **more: Any) -> Any:
    more = {"dtype": BF16, "head_size": 48} | more
    return MLAAttentionSpec(block_size=size, num_kv_heads=1, **more)


def hybrid(size: int = 16) -> dict[str, Any]:
    """Return six layers in three groups over one pool: 0 and 3 attend to all tokens, the others to the last 20."""
    window = SlidingWindowSpec(block_size=size, num_kv_heads=HEADS, head_size=32, dtype=BF16, sliding_window=20)
    whole = FullAttentionSpec(block_size=size, num_kv_heads=HEADS, head_size=32, dtype=BF16)
    return {name_of(i): whole if i % 3 == 0 else window for i in range(6)}

"""The memory that a model needs for each request, measured by running two tokens through it, not read from its config.

- `full`: layers that keep the keys and values of every token;
- `sliding`: layers that keep the keys and values of the last `window` tokens;
- `states`: layers that keep one state per request, overwritten by every token (convolutions, linear attention).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, __version__

from kvroom.errors import ConfigurationError

# Rotary embeddings whose angles depend on the longest sequence of the batch: keys in the pages would become wrong.
_UNSTABLE_ROPE = ("dynamic", "longrope")
_ATTENDING = ("full_attention", "sliding_attention")
_STATEFUL = ("conv", "linear_attention", "hybrid")
_STATE_KINDS = ("conv", "recurrent")
# Fraction of the largest logit: more than rounding errors in bfloat16, less than the effect of a lost state.
_CUT_ERROR = 0.05


class KVShape(NamedTuple):
    """The shape of keys and values: each of `layers` keeps `kv_heads` x `head_dim` elements of each per token."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


class StateShape(NamedTuple):
    """The shape of a state: `layer` keeps one tensor of `sizes` per request.

    `component` is "conv" or "recurrent", followed by a number from 1.
    """

    layer: int
    component: str
    sizes: tuple[int, ...]
    dtype: torch.dtype


class CacheShape(NamedTuple):
    """The shapes of everything that a model keeps of a request.

    Every layer is in `full` or `sliding`, or in `states`, or both in one of the first two and in `states`.
    """

    full: KVShape
    sliding: KVShape | None = None
    window: int = 0
    states: tuple[StateShape, ...] = ()


class _SeenLayer(NamedTuple):
    kv_heads: int
    head_dim: int
    window: int | None


class _AttentionProbe:
    """A substitute for `PagedBatch` that records the shapes of each layer and attends to all keys of a cache."""

    def __init__(self) -> None:
        self.seen: dict[int, _SeenLayer] = {}

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or not getattr(module, "is_causal", True):
            raise ConfigurationError("its keys, queries and values differ in head dimension, or it is not causal")
        if module.layer_idx in self.seen:
            raise ConfigurationError(f"layer {module.layer_idx} attends more than once")
        self.seen[module.layer_idx] = _SeenLayer(key.shape[0], key.shape[2], window)
        new, old = query.shape[1], key.shape[1] - query.shape[1]
        mask = torch.ones(new, old + new, dtype=torch.bool, device=query.device).tril(old)
        grouped = query.shape[0] != key.shape[0]
        return torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=grouped
        )[0].transpose(0, 1)


def probe(model: Any) -> CacheShape:
    """Run two tokens through `model` and return the shapes of everything that it keeps.

    Raises `ConfigurationError`, which names the model type, for a model that this engine does not support: with chunked
    attention, soft caps, sinks, head shapes or windows that differ between layers, or other kinds of layers.
    """
    try:
        return _probe(model)
    except (ConfigurationError, TypeError) as error:
        kind = model.config.model_type
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: {error}") from error


def cache_parameter(model: Any) -> str:
    """Return the name of the cache parameter of a model's `forward`: transformers 5.24 began to rename it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _probe(model: Any) -> CacheShape:
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {*_ATTENDING, *_STATEFUL})
    if others:
        raise ConfigurationError(f"layer types {', '.join(others)} are not supported")
    ropes = getattr(config, "rope_parameters", None) or {}  # for all layers, or a dict for each kind of layer
    for rope in (ropes, *(one for one in ropes.values() if isinstance(one, dict))):
        if rope.get("rope_type") in _UNSTABLE_ROPE:
            raise ConfigurationError(f"rope type {rope['rope_type']!r} is not supported")
    stateful = bool(kinds & set(_STATEFUL))
    if stateful and not hasattr(DynamicCache, "get_conv_state"):
        raise ConfigurationError(
            f"its states need a transformers with DynamicCache.get_conv_state; {__version__} is too old: upgrade it"
        )
    attention = _AttentionProbe()
    cache = DynamicCache(config=config) if stateful else None
    if _run(model, range(2), attention, cache).shape[1] != 1:
        raise ConfigurationError("it ignores the argument logits_to_keep")
    states = tuple(
        StateShape(layer, f"{kind}{number + 1}", tuple(state.shape[1:]), state.dtype)
        for layer, kept in enumerate(() if cache is None else cache.layers)
        for kind in _STATE_KINDS
        for number, state in getattr(kept, f"{kind}_states", {}).items()
        if state is not None
    )
    missing = set(range(config.num_hidden_layers)) - set(attention.seen) - {state.layer for state in states}
    if missing or not attention.seen:
        raise ConfigurationError(
            f"its {config.num_hidden_layers} layers do not all keep keys and values or a state (seen: {attention.seen})"
        )
    if states:
        # A prompt computed in two chunks must give the same logits as in one chunk. Some models lose their states.
        whole = _run(model, range(5), _AttentionProbe(), DynamicCache(config=config))
        cache = DynamicCache(config=config)
        _run(model, range(3), _AttentionProbe(), cache)
        cut = _run(model, range(3, 5), _AttentionProbe(), cache)
        if float((whole - cut).abs().max()) > _CUT_ERROR * float(whole.abs().max()):
            raise ConfigurationError("it loses its states when a prompt is computed in chunks")
    return _grouped(attention.seen, states)


def _run(model: Any, positions: range, attention: _AttentionProbe, cache: DynamicCache | None) -> torch.Tensor:
    """Return the logits after the last of `positions`, for a prompt whose token i has the id i."""
    tokens = torch.tensor([list(positions)], device=model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=tokens,
            position_ids=tokens,
            use_cache=False,
            logits_to_keep=torch.tensor([len(positions) - 1], device=model.device),
            paged=attention,
            **{cache_parameter(model): cache},
        ).logits
    return logits


def _grouped(seen: dict[int, _SeenLayer], states: tuple[StateShape, ...]) -> CacheShape:
    """Return the shapes by kind of layer.

    If all layers have a window, they are treated as `full`: a group "swa" exists only beside a main page table.
    """
    windows = {one.window for one in seen.values()} - {None}
    if len(windows) > 1:
        raise ConfigurationError(f"its layers have windows of different sizes: {sorted(map(str, windows))}")
    sliding = {layer: one for layer, one in seen.items() if one.window is not None}
    full = {layer: one for layer, one in seen.items() if one.window is None}
    if not full:
        return CacheShape(_kv_shape(sliding), states=states)
    if not sliding:
        return CacheShape(_kv_shape(full), states=states)
    return CacheShape(_kv_shape(full), _kv_shape(sliding), windows.pop() or 0, states)


def _kv_shape(seen: dict[int, _SeenLayer]) -> KVShape:
    shapes = {(one.kv_heads, one.head_dim) for one in seen.values()}
    if len(shapes) != 1:
        raise ConfigurationError(f"its layers {sorted(seen)} do not all keep keys and values of one shape: {seen}")
    ((kv_heads, head_dim),) = shapes
    return KVShape(tuple(sorted(seen)), kv_heads, head_dim)

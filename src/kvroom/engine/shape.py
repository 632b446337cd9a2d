"""What a model keeps of a request, learned by running two tokens through it instead of guessing from its config.

- keys and values of every token, in the layers of `full`;
- keys and values of the last `window` tokens, in the layers of `sliding`;
- one state for the whole request, overwritten with every token (convolutions, linear attention), in `states`.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, __version__

from kvroom.errors import ConfigurationError

# Rotary embeddings whose angles follow the longest sequence of the batch: keys written earlier would not fit.
_UNSTABLE_ROPE = ("dynamic", "longrope")
_ATTENDING = ("full_attention", "sliding_attention")
_STATEFUL = ("conv", "linear_attention", "hybrid")
_STATE_KINDS = ("conv", "recurrent")
# Of the largest logit: more than rounding makes even in bfloat16, less than a state that was forgotten.
_CUT_ERROR = 0.05


class KVShape(NamedTuple):
    """Each of `layers` keeps for a token a key and a value of `kv_heads` x `head_dim` elements."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int


class StateShape(NamedTuple):
    """`layer` keeps for a request one tensor of `sizes`; `component` is "conv" or "recurrent", then a number from 1."""

    layer: int
    component: str
    sizes: tuple[int, ...]
    dtype: torch.dtype


class CacheShape(NamedTuple):
    """All that a model keeps. Every layer is in `full` or in `sliding`, in `states`, or in one of each."""

    full: KVShape
    sliding: KVShape | None = None
    window: int = 0
    states: tuple[StateShape, ...] = ()


class _SeenLayer(NamedTuple):
    kv_heads: int
    head_dim: int
    window: int | None


class _AttentionProbe:
    """Stands in for a paged batch: notes who attends to what, and attends to all that a cache holds."""

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
    """Run two tokens through `model` and return what it keeps.

    Raises `ConfigurationError` naming the model type when it keeps something else than this engine can: chunked
    attention, soft caps, sinks, shapes of heads or windows that differ from layer to layer, other kinds of layers.
    """
    try:
        return _probe(model)
    except (ConfigurationError, TypeError) as error:
        kind = model.config.model_type
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: {error}") from error


def cache_parameter(model: Any) -> str:
    """How a model's `forward` calls its cache: transformers 5.24 began to rename it, model by model."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _probe(model: Any) -> CacheShape:
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {*_ATTENDING, *_STATEFUL})
    if others:
        raise ConfigurationError(f"layer types {', '.join(others)}")
    ropes = getattr(config, "rope_parameters", None) or {}  # of all layers, or of each kind of layer
    for rope in (ropes, *(one for one in ropes.values() if isinstance(one, dict))):
        if rope.get("rope_type") in _UNSTABLE_ROPE:
            raise ConfigurationError(f"rope type {rope['rope_type']!r}")
    stateful = bool(kinds & set(_STATEFUL))
    if stateful and not hasattr(DynamicCache, "get_conv_state"):
        raise ConfigurationError(f"its states need a newer transformers, whose caches give them out: {__version__}")
    attention = _AttentionProbe()
    cache = DynamicCache(config=config) if stateful else None
    if _run(model, range(2), attention, cache).shape[1] != 1:
        raise ConfigurationError("it ignores logits_to_keep")
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
        # A prompt that is computed in two chunks must come to what it comes to in one; not every model does that.
        whole = _run(model, range(5), _AttentionProbe(), DynamicCache(config=config))
        cache = DynamicCache(config=config)
        _run(model, range(3), _AttentionProbe(), cache)
        cut = _run(model, range(3, 5), _AttentionProbe(), cache)
        if float((whole - cut).abs().max()) > _CUT_ERROR * float(whole.abs().max()):
            raise ConfigurationError("it forgets its states when a prompt is computed in chunks")
    return _grouped(attention.seen, states)


def _run(model: Any, positions: range, attention: _AttentionProbe, cache: DynamicCache | None) -> torch.Tensor:
    """The logits after the last of `positions`, of a prompt whose token i is i."""
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
    """A window saves memory only beside layers that keep everything: without such layers, all keep everything."""
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

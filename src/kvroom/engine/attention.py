"""Attention over pages, for every model whose attention goes through transformers' attention interface.

A forward call carries its `PagedBatch` as a keyword argument down to the attention function, which writes the new keys
and values into their pages and attends to all that the pages hold. Nothing is global; the model itself keeps no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from kvroom.errors import ConfigurationError

NAME = "kvroom_paged"

# Rotary embeddings whose angles follow the longest sequence of the batch: keys written earlier would not fit.
_UNSTABLE_ROPE = ("dynamic", "longrope")
# What attention functions are handed by models that do more than scaled causal dot products.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


class KVShape(NamedTuple):
    """What a model keeps for each token: `layers` x (key, value) x `kv_heads` x `head_dim` elements."""

    layers: int
    kv_heads: int
    head_dim: int


class Chunk(NamedTuple):
    """Tokens at positions [start, start + len(tokens)) of a sequence; positions before them are in its pages already.

    `pages[i]` holds positions [i * page_tokens, (i + 1) * page_tokens) and they reach at least to the chunk's end.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


class _Span(NamedTuple):
    """One chunk of a batch: rows [first, stop) of it, the pages to read, the number of tokens in them."""

    first: int
    stop: int
    pages: torch.Tensor
    length: int
    mask: torch.Tensor | None


class _Attends(Protocol):
    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, /
    ) -> torch.Tensor: ...


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: _Attends | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Query [1, heads, n, dim], key and value [1, kv_heads, n, dim] -> output [1, n, heads, dim]."""
    if paged is None:
        raise ConfigurationError("it does not pass keyword arguments down to its attention")
    if attention_mask is not None:
        raise ConfigurationError("it passes an attention mask of its own, which is not applied here")
    for option in _UNSUPPORTED:
        if options.get(option) is not None:
            raise ConfigurationError(f"its attention wants {option}, which is not done here")
    return paged.attend(module, query[0], key[0], value[0], scaling).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


class PagedBatch:
    """Where the tokens of one forward call lie in the pool, computed once for all layers.

    `pool` is [layers, 2, pages, page_tokens, kv_heads, head_dim].
    """

    def __init__(self, pool: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        page_tokens = pool.shape[3]
        self._keys = pool[:, 0]
        self._values = pool[:, 1]
        slots, self._spans, first = [], list[_Span](), 0
        for chunk in chunks:
            length = chunk.start + len(chunk.tokens)
            pages = torch.tensor(chunk.pages[: -(-length // page_tokens)], dtype=torch.int64)
            positions = torch.arange(chunk.start, length)
            slots.append(pages[positions // page_tokens] * page_tokens + positions % page_tokens)
            mask = _causal_mask(chunk.start, length).to(pool.device) if len(chunk.tokens) > 1 else None
            stop = first + len(chunk.tokens)
            self._spans.append(_Span(first, stop, pages.to(pool.device), length, mask))
            first = stop
        self._slots = torch.cat(slots).to(pool.device)

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Write `key` and `value` [kv_heads, n, dim], attend with `query` [heads, n, dim]; returns [n, heads, dim].

        Each sequence is attended for itself and reads exactly its own tokens, so that neither another sequence nor
        what earlier requests left behind in a page can touch its numbers.
        """
        keys, values = self._keys[module.layer_idx], self._values[module.layer_idx]
        keys.flatten(0, 1).index_copy_(0, self._slots, key.transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, self._slots, value.transpose(0, 1))
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, span.first : span.stop],
                _gather(keys, span),
                _gather(values, span),
                attn_mask=span.mask,
                scale=scaling,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
            for span in self._spans
        ]
        return torch.cat(out, dim=1).transpose(0, 1)


def _gather(layer: torch.Tensor, span: _Span) -> torch.Tensor:
    """Tokens [0, span.length) of one sequence out of [pages, page_tokens, heads, dim], as [1, heads, length, dim]."""
    return layer.index_select(0, span.pages).flatten(0, 1)[: span.length].transpose(0, 1).unsqueeze(0)


def _causal_mask(start: int, length: int) -> torch.Tensor:
    """True where the query at position start + i may see the key at position j: j <= start + i."""
    return torch.ones(length - start, length, dtype=torch.bool).tril(start)


@dataclass
class _ShapeProbe:
    """Stands in for a batch once, to learn what a model keeps for a token instead of guessing it from its config."""

    seen: dict[int, tuple[int, int]]

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _scaling: float | None
    ) -> torch.Tensor:
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or not getattr(module, "is_causal", True):
            raise ConfigurationError("its keys, queries and values differ in head dimension, or it is not causal")
        if module.layer_idx in self.seen:
            raise ConfigurationError(f"layer {module.layer_idx} attends more than once")
        self.seen[module.layer_idx] = (key.shape[0], key.shape[2])
        return query.transpose(0, 1)


def probe(model: Any) -> KVShape:
    """Run two tokens through `model` and return what it keeps for each.

    Raises `ConfigurationError` naming the model type when its attention is of a kind that this engine does not do:
    sliding windows, chunks, soft caps, sinks, several shapes of heads, layers without attention.
    """
    kind = model.config.model_type
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _UNSTABLE_ROPE:
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: rope type {rope['rope_type']!r}")
    others = sorted(set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: layer types {', '.join(others)}")
    seen: dict[int, tuple[int, int]] = {}
    tokens = torch.tensor([[0, 1]], device=model.device)
    keep = torch.tensor([1], device=model.device)
    try:
        with torch.inference_mode():
            output = model(
                input_ids=tokens,
                position_ids=tokens,
                use_cache=False,
                logits_to_keep=keep,
                paged=_ShapeProbe(seen),
            )
    except (ConfigurationError, TypeError) as fault:
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: {fault}") from fault
    if output.logits.shape[1] != 1:
        raise ConfigurationError(f"model type {kind!r} cannot run on this engine: it ignores logits_to_keep")
    layers = model.config.num_hidden_layers
    if sorted(seen) != list(range(layers)) or len(set(seen.values())) != 1:
        raise ConfigurationError(
            f"model type {kind!r} cannot run on this engine: its {layers} layers do not all keep keys and values of "
            f"one shape (seen: {seen})"
        )
    kv_heads, head_dim = seen[0]
    return KVShape(layers, kv_heads, head_dim)

"""Attention over pages, for every model whose attention goes through transformers' attention interface.

A forward call passes its `PagedBatch` as a keyword argument down to the attention function. That function writes the
new keys and values into their pages and attends to everything that the pages hold. There is no global state, and the
model itself keeps no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from kvroom.errors import ConfigurationError

from .pool import KVPages, PagedPool

NAME = "kvroom_paged"

# Keyword arguments of models whose attention does more than scaled causal dot products.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class Chunk(NamedTuple):
    """Tokens at positions [start, start + len(tokens)) of a sequence, and the pages of the whole sequence.

    `pages[i]` holds positions [i * page_tokens, (i + 1) * page_tokens). The pages contain the keys and values of all
    earlier positions and reach at least to the chunk's end. Layers with a sliding window use `ring` instead: there the
    same positions are in `ring[i % len(ring)]`. `slot` is the slot of the sequence's states.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    ring: Sequence[int] = ()
    slot: int = 0

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


class _Span(NamedTuple):
    """One chunk of a batch: its rows [first, stop), and the `length` keys that these rows read.

    The first of those keys is `skip` tokens after the start of `pages`.
    """

    first: int
    stop: int
    pages: torch.Tensor
    skip: int
    length: int
    mask: torch.Tensor | None


class _Attends(Protocol):
    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        /,
        *,
        scaling: float | None,
        window: int | None,
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
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Map query [1, heads, n, dim] and key, value [1, kv_heads, n, dim] to the output [1, n, heads, dim]."""
    if paged is None:
        raise ConfigurationError("it does not pass keyword arguments down to its attention")
    if attention_mask is not None:
        raise ConfigurationError("it passes its own attention mask, which is not supported")
    for option in _UNSUPPORTED:
        if options.get(option) is not None:
            raise ConfigurationError(f"its attention uses {option}, which is not supported")
    return paged.attend(module, query[0], key[0], value[0], scaling=scaling, window=sliding_window).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)


class PagedBatch:
    """The places in the pool of the tokens of one forward call, computed once for each group of layers."""

    def __init__(self, pool: PagedPool, chunks: Sequence[Chunk]) -> None:
        self._pool = pool
        self._chunks = chunks
        self._slots: dict[str, torch.Tensor] = {}  # by group
        self._spans: dict[tuple[str, int | None], list[_Span]] = {}  # by group and window

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Write `key` and `value` [kv_heads, n, dim], attend with `query` [heads, n, dim], return [n, heads, dim].

        Attention runs once per sequence and reads exactly the tokens of that sequence. Its result therefore depends
        neither on the other sequences of the batch nor on leftovers of earlier requests in a page. With a `window`, a
        token attends to itself and to the `window - 1` tokens before it.
        """
        group = self._pool.group_of(module.layer_idx)
        keys, values = group.layer(module.layer_idx)
        slots = self._written(group)
        keys.flatten(0, 1).index_copy_(0, slots, key.transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, slots, value.transpose(0, 1))
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, span.first : span.stop],
                _gather(keys, span),
                _gather(values, span),
                attn_mask=span.mask,
                scale=scaling,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
            for span in self._read(group, window)
        ]
        return torch.cat(out, dim=1).transpose(0, 1)

    def _written(self, group: KVPages) -> torch.Tensor:
        """Return the place of each of the batch's tokens: page * page_tokens + token in page."""
        if group.name not in self._slots:
            tokens = group.page_tokens
            slots = []
            for chunk in self._chunks:
                positions = torch.arange(chunk.start, chunk.stop)
                pages = _pages(group, chunk, chunk.start // tokens, -(-chunk.stop // tokens))
                slots.append(pages[positions // tokens - chunk.start // tokens] * tokens + positions % tokens)
            self._slots[group.name] = torch.cat(slots).to(group.data.device)
        return self._slots[group.name]

    def _read(self, group: KVPages, window: int | None) -> list[_Span]:
        """Return the keys that the rows of each chunk read: those of all positions up to theirs, or of the window."""
        if (group.name, window) in self._spans:
            return self._spans[group.name, window]
        spans: list[_Span] = []
        first, device = 0, group.data.device
        for chunk in self._chunks:
            oldest = 0 if window is None else max(0, chunk.start - window + 1)
            page = oldest // group.page_tokens
            mask = None
            if len(chunk.tokens) > 1:
                # [tokens, keys]: the query at position start + i sees the key at position oldest + j if that position
                # is not later, and is less than `window` positions earlier.
                ahead = chunk.start - oldest
                mask = torch.ones(len(chunk.tokens), chunk.stop - oldest, dtype=torch.bool).tril(ahead)
                mask = (mask if window is None else mask.triu(ahead - window + 1)).to(device)
            spans.append(
                _Span(
                    first=first,
                    stop=first + len(chunk.tokens),
                    pages=_pages(group, chunk, page, -(-chunk.stop // group.page_tokens)).to(device),
                    skip=oldest - page * group.page_tokens,
                    length=chunk.stop - oldest,
                    mask=mask,
                )
            )
            first += len(chunk.tokens)
        self._spans[group.name, window] = spans
        return spans


def _pages(group: KVPages, chunk: Chunk, first: int, stop: int) -> torch.Tensor:
    """Return the pages that hold page indices [first, stop) of the chunk's sequence."""
    if group.window:
        return torch.tensor([chunk.ring[index % len(chunk.ring)] for index in range(first, stop)], dtype=torch.int64)
    return torch.tensor(chunk.pages[first:stop], dtype=torch.int64)


def _gather(layer: torch.Tensor, span: _Span) -> torch.Tensor:
    """Return the keys or values that a span reads from [pages, page_tokens, heads, dim]: [1, heads, length, dim]."""
    tokens = layer.index_select(0, span.pages).flatten(0, 1)
    return tokens[span.skip : span.skip + span.length].transpose(0, 1).unsqueeze(0)

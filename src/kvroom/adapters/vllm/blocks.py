"""Translation of vLLM's block ids into kvroom's page lists.

The law: a page list holds exactly the requested tokens, and never contains vLLM's null block. vLLM keeps one list of
block ids for each KV cache group of a request. Entry i of a list holds tokens [i * block_size, (i + 1) * block_size).
Once the tokens of an entry lie before the group's sliding window, vLLM frees the block and writes the null block,
number 0, into the entry.

This module imports neither torch nor vLLM: it distinguishes vLLM's cache specs by their class names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvroom.errors import ConfigurationError, PlanError

NULL_BLOCK = 0

_FULL = ("FullAttentionSpec", "MLAAttentionSpec")
_SLIDING = ("SlidingWindowSpec", "SlidingWindowMLASpec")


class BlockGroup(NamedTuple):
    """One of vLLM's KV cache groups under its name in kvroom."""

    number: int
    """The group's index in vLLM's `kv_cache_groups`."""
    name: str
    """The name of the group in kvroom's layout; "" for the main group."""
    window: int
    """The number of last tokens that are moved, or 0 if all are."""
    block_size: int
    """In tokens."""


def groups_of(kv_cache_config: Any) -> tuple[BlockGroup, ...]:
    """Return the groups that are handed over, in vLLM's order.

    The first group with full attention is the main group. Other groups with full attention are called "full.<index>",
    and groups with a sliding window "window.<index>". If every layer of a model has a sliding window, there is no main
    group. A token attends to itself and to the `sliding_window` - 1 tokens before it, so the next token needs that
    number of tokens, and they are moved.

    Raises `ConfigurationError` for layers whose cache this connector cannot hand over.
    """
    found: list[BlockGroup] = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        role = getattr(group, "role", "default")
        if getattr(group, "host_resident", False) or getattr(role, "value", role) != "default":
            raise ConfigurationError(
                f"KV cache group {index} has the role {getattr(role, 'value', role)!r}, a sparse cache in host memory: "
                f"this connector does not support it yet; serve the model without that cache"
            )
        spec = _one_spec(index, group)
        if type(spec).__name__ in _SLIDING:
            window = spec.sliding_window - 1 + getattr(spec, "extra_retained_tokens", 0)
            if window < 1:
                raise ConfigurationError(
                    f"KV cache group {index} has a sliding window of {spec.sliding_window}: its layers read no earlier "
                    f"token, so there is nothing to hand over; serve the model without kvroom"
                )
            found.append(BlockGroup(index, f"window.{index}", window, spec.block_size))
        else:
            main = all(one.name for one in found)
            found.append(BlockGroup(index, "" if main else f"full.{index}", 0, spec.block_size))
    if not found:
        raise ConfigurationError("the model has no KV cache: there is nothing to hand over; serve it without kvroom")
    return tuple(found)


def _one_spec(index: int, group: Any) -> Any:
    """Return one spec that represents all layers of a group. Raise `ConfigurationError` if a layer is not supported."""
    spec = group.kv_cache_spec
    specs = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    kinds = sorted({type(one).__name__ for one in specs})
    unknown = [kind for kind in kinds if kind not in _FULL + _SLIDING]
    if unknown:
        raise ConfigurationError(
            f"KV cache group {index} (layers {group.layer_names[:1]}) has a {unknown[0]}, which is not supported yet: "
            f"this connector hands over full, MLA and sliding-window attention; serve the model without kvroom"
        )
    windows = {getattr(one, "sliding_window", None) if type(one).__name__ in _SLIDING else None for one in specs}
    if len(windows) > 1:
        raise ConfigurationError(
            f"KV cache group {index} mixes the sliding windows {sorted(windows, key=str)}: this connector supports "
            f"one window in each group; serve the model without kvroom"
        )
    return specs[0]


class BlockTables:
    """The translation of a request's block ids, which vLLM's scheduler gives as one list for each KV cache group.

    The constructor raises `ConfigurationError` as `groups_of` does.
    """

    def __init__(self, kv_cache_config: Any) -> None:
        self.groups = groups_of(kv_cache_config)
        self._total = len(kv_cache_config.kv_cache_groups)
        self._main = next((group for group in self.groups if not group.name), None)
        self._further = tuple(group for group in self.groups if group.name)
        self._first = self._main or self.groups[0]

    @property
    def block_size(self) -> int:
        """The number of tokens in a block of the main group, or of the first group if there is no main group."""
        return self._first.block_size

    def align(self, tokens: int) -> int:
        """Round a number of tokens down to whole blocks."""
        return tokens // self.block_size * self.block_size

    def handed(self, tokens: int) -> int:
        """Return the number of tokens that are handed over of a prompt of `tokens`. The consumer computes the others.

        Without sliding windows, all tokens are handed over. With one, there are two restrictions:

        - The last token is not handed over. vLLM computes the last token of a prompt even if the whole prompt was
          loaded. That token attends to one token before the window of the next one, whose block vLLM may have freed.
        - Each window must begin at the start of a block, because vLLM puts all blocks of a loaded prompt into its
          prefix cache, where a block that was loaded only in part would give other requests wrong tokens.
        """
        sliding = [group for group in self.groups if group.window]
        handed = tokens - 1 if sliding else tokens
        while True:
            over = max((max(0, handed - one.window) % one.block_size for one in sliding), default=0)
            if over == 0:
                return handed
            handed -= over

    def loads_after(self, computed: int, handed: int) -> bool:
        """Return True if a consumer that has the first `computed` tokens in its prefix cache may load the rest.

        Groups other than the main one are moved whole. If the cached prefix reaches into the tokens that are moved of
        such a group, the load would overwrite blocks that other requests read. The consumer then computes the rest of
        the prompt itself; behind a sliding window, that is less than one window.
        """
        starts = ((max(0, handed - one.window) if one.window else 0) // one.block_size for one in self._further)
        return all(computed <= start * one.block_size for start, one in zip(starts, self._further, strict=True))

    def pages(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """Return the main group's pages for tokens [start, stop); the first page holds `start`.

        The list is empty if there is no main group. Raises `PlanError` if the request has too few blocks, or if vLLM
        has freed one of them.
        """
        return self._pages(self._main, block_ids, start, stop) if self._main else []

    def windows(self, block_ids: Sequence[Sequence[int]], stop: int) -> dict[str, list[int]]:
        """Return the pages of every other group, by name, for a request whose first `stop` tokens are handed over.

        They hold the group's sliding window, or all tokens if it has none. Raises `PlanError` as `pages` does.
        """
        return {
            group.name: self._pages(group, block_ids, max(0, stop - group.window) if group.window else 0, stop)
            for group in self._further
        }

    def main_blocks(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """Return the block ids by which vLLM identifies a failed load of tokens [start, stop), without null blocks."""
        first, last = _span(start, stop, self._first.block_size)
        return [block for block in self._ids(self._first, block_ids)[first:last] if block != NULL_BLOCK]

    def _ids(self, group: BlockGroup, block_ids: Sequence[Sequence[int]]) -> Sequence[int]:
        if len(block_ids) != self._total:
            raise PlanError(
                f"expected block ids of {self._total} KV cache groups, as vLLM was started with, got {len(block_ids)}"
            )
        return block_ids[group.number]

    def _pages(self, group: BlockGroup, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        blocks = self._ids(group, block_ids)
        first, last = _span(start, stop, group.block_size)
        if last > len(blocks):
            raise PlanError(
                f"tokens [{start}, {stop}) of KV cache group {group.number} need blocks [{first}, {last}), but the "
                f"request has {len(blocks)}; call this after vLLM has allocated them"
            )
        pages = list(blocks[first:last])
        if NULL_BLOCK in pages:
            raise PlanError(
                f"tokens [{start}, {stop}) of KV cache group {group.number}: block {first + pages.index(NULL_BLOCK)} "
                f"of the request is vLLM's null block, so vLLM has freed these tokens; hand over fewer tokens"
            )
        return pages


def _span(start: int, stop: int, block_size: int) -> tuple[int, int]:
    """Return the range of a request's blocks that hold tokens [start, stop). Both ranges are half-open."""
    if not 0 <= start <= stop:
        raise PlanError(f"invalid range: tokens [{start}, {stop}); expected 0 <= start <= stop")
    first = start // block_size
    return first, -(-stop // block_size) if stop > start else first

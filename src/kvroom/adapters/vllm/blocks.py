"""Conversion of vLLM's block ids to kvroom's pages.

The law: the returned pages hold exactly the requested tokens, and never include vLLM's null block. vLLM numbers blocks
separately for each KV cache group. Position i of a group's list holds tokens [i * block_size, (i + 1) * block_size). A
block that the group has freed, because it lies before a sliding window, is the null block, number 0. This module needs
neither torch nor vLLM: it recognises specs by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvroom.errors import ConfigurationError, PlanError

NULL_BLOCK = 0

_FULL = ("FullAttentionSpec", "MLAAttentionSpec")
_SLIDING = ("SlidingWindowSpec", "SlidingWindowMLASpec")


class BlockGroup(NamedTuple):
    """One of vLLM's KV cache groups, with its name in kvroom."""

    number: int
    """Its index in `kv_cache_groups`."""
    name: str
    """"" for the main group."""
    window: int
    """The number of last computed tokens to move; 0 for all."""
    block_size: int
    """Tokens per block."""


def groups_of(kv_cache_config: Any) -> tuple[BlockGroup, ...]:
    """Return the groups that are handed over, in vLLM's order.

    The first group of full attention is the main one. Others are named "full.<index>", and those with a sliding window
    "window.<index>". A model whose layers all have a window has no main group: everything is moved as windows. The next
    token attends to the `sliding_window` - 1 tokens before it, so that number of tokens is moved.

    Raises:
        ConfigurationError: This connector cannot hand over the cache of a layer.
    """
    found: list[BlockGroup] = []
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        role = getattr(group, "role", "default")
        if getattr(group, "host_resident", False) or getattr(role, "value", role) != "default":
            raise ConfigurationError(
                f"KV cache group {index} has the role {getattr(role, 'value', role)!r} of a sparse cache on the host: "
                f"this connector cannot hand it over yet; serve the model without it"
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
    """Return the spec that represents all layers of a group. Raise `ConfigurationError` for an unsupported kind."""
    spec = group.kv_cache_spec
    specs = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]
    kinds = sorted({type(one).__name__ for one in specs})
    unknown = [kind for kind in kinds if kind not in _FULL + _SLIDING]
    if unknown:
        raise ConfigurationError(
            f"KV cache group {index} (layers {group.layer_names[:1]}) is of the kind {unknown[0]}: this connector "
            f"hands over full, MLA and sliding-window attention, not this kind yet; serve the model without kvroom"
        )
    windows = {getattr(one, "sliding_window", None) if type(one).__name__ in _SLIDING else None for one in specs}
    if len(windows) > 1:
        raise ConfigurationError(
            f"KV cache group {index} mixes the sliding windows {sorted(windows, key=str)}: this connector needs one "
            f"window for each group; serve the model without kvroom"
        )
    return specs[0]


class BlockTables:
    """Lookups in the block ids of vLLM's scheduler, which are a tuple with one list for each KV cache group."""

    def __init__(self, kv_cache_config: Any) -> None:
        """Read the groups. Raise `ConfigurationError` as `groups_of` does."""
        self.groups = groups_of(kv_cache_config)
        self._total = len(kv_cache_config.kv_cache_groups)
        self._main = next((group for group in self.groups if not group.name), None)
        self._further = tuple(group for group in self.groups if group.name)
        self._first = self._main or self.groups[0]

    @property
    def block_size(self) -> int:
        """The number of tokens in a block of the main group or, without one, of the first group."""
        return self._first.block_size

    def align(self, tokens: int) -> int:
        """Round down to a whole number of blocks."""
        return tokens // self.block_size * self.block_size

    def handed(self, tokens: int) -> int:
        """Return how many tokens of a prompt of `tokens` are handed over; the consumer computes the rest.

        All of them, unless a group has a sliding window. In that case the last one is left out: after loading a whole
        prompt, vLLM computes its last token again, and by then it would have freed the oldest token of its window. And
        a window must start at a block boundary: vLLM adds every block of a loaded prompt to its prefix cache, so no
        block may be partly filled.
        """
        sliding = [group for group in self.groups if group.window]
        handed = tokens - 1 if sliding else tokens
        while True:
            over = max((max(0, handed - one.window) % one.block_size for one in sliding), default=0)
            if over == 0:
                return handed
            handed -= over

    def loads_after(self, computed: int, handed: int) -> bool:
        """Return True if a consumer that has the first `computed` tokens may load the others of `handed`.

        Windows are moved as a whole. If the consumer's own prefix reaches into a window, the load would write to blocks
        that other requests read. The consumer then computes the rest, which is less than a window.
        """
        starts = ((max(0, handed - one.window) if one.window else 0) // one.block_size for one in self._further)
        return all(computed <= start * one.block_size for start, one in zip(starts, self._further, strict=True))

    def pages(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """Return the main group's pages that hold tokens [start, stop); the first one holds `start`.

        The list is empty without a main group. Raise `PlanError` if the request has too few blocks, or has freed one of
        them.
        """
        return self._pages(self._main, block_ids, start, stop) if self._main else []

    def windows(self, block_ids: Sequence[Sequence[int]], stop: int) -> dict[str, list[int]]:
        """Return, for each further group, the pages of a request of `stop` tokens: those of its window, or all.

        Raise `PlanError` as `pages` does.
        """
        return {
            group.name: self._pages(group, block_ids, max(0, stop - group.window) if group.window else 0, stop)
            for group in self._further
        }

    def main_blocks(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """Return the block ids by which a failed load of tokens [start, stop) is reported, without null blocks."""
        first, last = _span(start, stop, self._first.block_size)
        return [block for block in self._ids(self._first, block_ids)[first:last] if block != NULL_BLOCK]

    def _ids(self, group: BlockGroup, block_ids: Sequence[Sequence[int]]) -> Sequence[int]:
        if len(block_ids) != self._total:
            raise PlanError(f"block ids of {len(block_ids)} KV cache groups; vLLM was started with {self._total}")
        return block_ids[group.number]

    def _pages(self, group: BlockGroup, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        blocks = self._ids(group, block_ids)
        first, last = _span(start, stop, group.block_size)
        if last > len(blocks):
            raise PlanError(
                f"tokens [{start}, {stop}) of KV cache group {group.number} take blocks [{first}, {last}), but the "
                f"request has {len(blocks)}; ask after vLLM has allocated them"
            )
        pages = list(blocks[first:last])
        if NULL_BLOCK in pages:
            raise PlanError(
                f"tokens [{start}, {stop}) of KV cache group {group.number}: block {first + pages.index(NULL_BLOCK)} "
                f"of the request is vLLM's null block, so these tokens were given up; hand over fewer tokens"
            )
        return pages


def _span(start: int, stop: int, block_size: int) -> tuple[int, int]:
    """Return the half-open range of a request's blocks that hold tokens [start, stop)."""
    if not 0 <= start <= stop:
        raise PlanError(f"invalid token range [{start}, {stop}): give 0 <= start <= stop")
    first = start // block_size
    return first, -(-stop // block_size) if stop > start else first

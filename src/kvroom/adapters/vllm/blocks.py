"""From vLLM's block ids to kvroom's pages.

The law: what is returned holds exactly the tokens that were asked for, and never vLLM's null block. vLLM numbers
blocks for each KV cache group apart; position i of a group's list holds tokens [i * block_size, (i + 1) * block_size),
and a block that the group gave up (it lies before a sliding window) is the null block, number 0. Nothing here needs
torch or vLLM: specs are told apart by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvroom.errors import ConfigurationError, PlanError

NULL_BLOCK = 0

_FULL = ("FullAttentionSpec", "MLAAttentionSpec")
_SLIDING = ("SlidingWindowSpec", "SlidingWindowMLASpec")


class BlockGroup(NamedTuple):
    """One of vLLM's KV cache groups, as kvroom names it.

    `number` is its place in `kv_cache_groups`; `name` is "" for the main one. `window` is how many of the last computed
    tokens are moved, 0: all. `block_size` is in tokens.
    """

    number: int
    name: str
    window: int
    block_size: int


def groups_of(kv_cache_config: Any) -> tuple[BlockGroup, ...]:
    """The groups that are handed over, in vLLM's order.

    The first group of full attention is the main one; others are "full.<index>", those with a sliding window
    "window.<index>". A model all of whose layers have a window has no main group: everything is moved as windows.
    The next token attends to the `sliding_window` - 1 tokens before it, so that many are moved.

    Raises `ConfigurationError` for layers whose cache this connector cannot hand over.
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
    """The spec that stands for all layers of a group. `ConfigurationError` unless their kind can be handed over."""
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
    """Reads the block ids that vLLM's scheduler gives: a tuple with one list for each KV cache group.

    Raises `ConfigurationError`, as `groups_of` does.
    """

    def __init__(self, kv_cache_config: Any) -> None:
        self.groups = groups_of(kv_cache_config)
        self._total = len(kv_cache_config.kv_cache_groups)
        self._main = next((group for group in self.groups if not group.name), None)
        self._further = tuple(group for group in self.groups if group.name)
        self._first = self._main or self.groups[0]

    @property
    def block_size(self) -> int:
        """Tokens in a block of the main group, or of the first one if there is no main group."""
        return self._first.block_size

    def align(self, tokens: int) -> int:
        """Down to a whole number of blocks."""
        return tokens // self.block_size * self.block_size

    def handed(self, tokens: int) -> int:
        """How many tokens of a prompt of `tokens` are handed over; the consumer computes the others.

        All of them, unless a group has a sliding window. Then the last one is left: vLLM computes it again after a
        whole prompt was loaded, and would by then have given up the oldest token of its window. And a window must begin
        with a block: vLLM files every block of a loaded prompt in its prefix cache, so none may be filled in part.
        """
        sliding = [group for group in self.groups if group.window]
        handed = tokens - 1 if sliding else tokens
        while True:
            over = max((max(0, handed - one.window) % one.block_size for one in sliding), default=0)
            if over == 0:
                return handed
            handed -= over

    def loads_after(self, computed: int, handed: int) -> bool:
        """Whether a consumer that has the first `computed` tokens may load the others of `handed`.

        Windows are moved whole. Where the consumer's own prefix reaches into one, blocks that other requests read would
        be written: then it may not, and what is left to compute is less than a window.
        """
        starts = ((max(0, handed - one.window) if one.window else 0) // one.block_size for one in self._further)
        return all(computed <= start * one.block_size for start, one in zip(starts, self._further, strict=True))

    def pages(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """The main group's pages that hold tokens [start, stop); `[0]` holds `start`. Empty without a main group.

        `PlanError` if the request has too few blocks, or has given one of them up.
        """
        return self._pages(self._main, block_ids, start, stop) if self._main else []

    def windows(self, block_ids: Sequence[Sequence[int]], stop: int) -> dict[str, list[int]]:
        """Of each further group the pages that hold its tokens of a request of `stop` tokens: the last ones, or all.

        `PlanError`, as `pages`.
        """
        return {
            group.name: self._pages(group, block_ids, max(0, stop - group.window) if group.window else 0, stop)
            for group in self._further
        }

    def main_blocks(self, block_ids: Sequence[Sequence[int]], start: int, stop: int) -> list[int]:
        """The block ids by which a failed load of tokens [start, stop) is reported; null blocks are left out."""
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
    """Which blocks of a request hold tokens [start, stop), half-open."""
    if not 0 <= start <= stop:
        raise PlanError(f"tokens [{start}, {stop}) are no range; give 0 <= start <= stop")
    first = start // block_size
    return first, -(-stop // block_size) if stop > start else first

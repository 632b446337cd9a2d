"""Any layout to any layout: 20,000 hand-offs between engines that split and store a model in different ways.

A quick run draws a quarter of them.

Every element of the target that should be written is written exactly once, from the source that should write it, by
blocks that could not be fewer; nothing else is touched.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import HandOff, Rank, Send, hand_offs, kinds_of

from kvroom.plan import Blocks, Planner, Strip, extents, shares, strips
from kvroom_lab import oracle
from sampling import amount

# No deadline: a busy machine must not fail a plan.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Theme(NamedTuple):
    """A choice of worlds to draw, their number, and the features that must occur in them often."""

    examples: int
    layers: list[str]
    widths: list[int]
    tokens: bool
    occurs: list[str]

    def worlds(self) -> st.SearchStrategy[HandOff]:
        """One to three layers of these kinds, split by these widths."""
        kinds = [list(some) for count in (1, 2, 3) for some in product(self.layers, repeat=count)]
        widths = list(product(self.widths, ["even", "overlapping"]))
        return hand_offs(st.sampled_from(kinds), st.sampled_from(widths), self.tokens, "draft" in self.occurs)


ALWAYS = [
    "wider sink", "wider source", "one page size is a multiple", "no page size is a multiple", "prefix", "chunks",
    "nothing to move", "head-major to token-major", "token-major to head-major", "one allocation", "several sources",
    "keys beside values",
]  # fmt: skip
TOKENS = [
    "source interleaves tokens", "sink interleaves tokens", "both interleave, in other ways", "both interleave alike",
    "source sends scattered tokens",
]  # fmt: skip
STAGES = ["pipeline stages on both sides", "stages cut elsewhere"]
THEMES = {
    "heads": Theme(
        9000,
        ["full"],
        [1, 2, 3, 4, 6, 8],
        False,
        [*STAGES, "replicated heads", "heads that do not divide", "draft", "eight ranks"],
    ),
    "latent": Theme(1500, ["latent", "indexed", "compressed"], [1, 2, 4], False, ["latent", "compressed"]),
    "tokens": Theme(3000, ["full", "latent", "scaled"], [1, 2], True, [*TOKENS, "scales", "latent"]),
    "groups": Theme(
        5000,
        ["full", "sliding", "state", "scaled", "opaque", "packed"],
        [1, 2, 4],
        False,
        [*STAGES, "window", "state", "scales", "opaque", "opaque pages"],
    ),
    "everything": Theme(
        1500,
        ["full", "latent", "scaled", "compressed", "sliding", "state", "indexed", "opaque", "packed"],
        [1, 2],
        True,
        [*TOKENS, *STAGES, "second page table", "window", "state", "scales", "opaque", "opaque pages", "draft"],
    ),
}


def test_there_are_twenty_thousand() -> None:
    assert sum(theme.examples for theme in THEMES.values()) >= 20_000


@pytest.mark.parametrize("name", THEMES)
def test_every_element_is_written_once_from_the_source_that_should_write_it(name: str) -> None:
    theme = THEMES[name]
    examples, often = amount(theme.examples // 4, full=theme.examples), amount(3, full=20)
    seen: Counter[str] = Counter()

    @settings(patient, max_examples=examples)
    @given(theme.worlds())
    def check(one: HandOff) -> None:
        check_hand_off(one)
        seen.update(["cases", *kinds_of(one)])

    check()
    print(f"{name}: {dict(seen)}")
    assert seen["cases"] >= examples
    rare = [kind for kind in [*ALWAYS, *theme.occurs] if seen[kind] < often]
    assert rare == [], f"of {examples} cases, fewer than {often} had {rare}"


def check_hand_off(one: HandOff) -> None:
    """Move everything in simulated memory, and compare with the oracle."""
    names = oracle.Names()
    layout = one.target.layout
    wanted = target_memory(one, names)
    got, writes, writer = np.zeros_like(wanted), np.zeros_like(wanted), np.full_like(wanted, -1)
    first = np.full_like(wanted, -1)
    for group in {region.group for region in layout.regions if one.model.groups[region.group].window}:
        assert layout.window_start(group, one.windows[group][1]) == one.windows[group][0]
    parts = shares([source.layout for source in one.sources], layout)
    for number, source in enumerate(one.sources):
        memory = source_memory(one, number, names)
        planner = Planner(source.layout, layout, parts[number])
        before = writes.copy()
        for send in one.sends[number]:
            oracle.apply(planned(planner, source, one, send), memory, got, writes)
        writer[writes > before] = number
        first[names.among(memory)[wanted] & (first < 0)] = number
    assert np.array_equal(writes, wanted > 0)
    assert np.array_equal(got, wanted)
    assert np.array_equal(writer, first)


def target_memory(one: HandOff, names: oracle.Names) -> oracle.Memory:
    """The target's pool after the hand-off."""
    memory = oracle.blank(one.target.layout)
    for group, window in one.windows.items():
        pages = one.target.pages(group, one.begins[group], window[1])
        oracle.fill(memory, names, one.target.layout, pages, one.begins[group], window, group)
    return memory


def source_memory(one: HandOff, number: int, names: oracle.Names) -> oracle.Memory:
    """A source's pool before the hand-off: only the tokens that it sends are there."""
    source = one.sources[number]
    memory = oracle.blank(source.layout)
    for group, start, stop, begin in one.held[number]:
        oracle.fill(memory, names, source.layout, source.pages(group, begin, stop), begin, (start, stop), group)
    return memory


def planned(planner: Planner, source: Rank, one: HandOff, send: Send) -> Blocks:
    """The blocks of one send: maximal and in order."""
    group, start, stop, begin = send
    target_begin = one.begins[group]
    blocks = planner.copies(
        source.pages(group, begin, stop),
        one.target.pages(group, target_begin, stop),
        start,
        stop,
        source_start=begin,
        target_start=target_begin,
        group=group,
    )
    assert [column.dtype for column in blocks] == [np.uint64] * 3
    assert oracle.joinable(blocks) == []
    assert (blocks.dst[1:] > blocks.dst[:-1]).all()
    return blocks


def ranges_of(memory: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the true bytes as (address, length), sorted, disjoint and not adjacent."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], memory, [False])))).reshape(-1, 2)
    return [(begin, end - begin) for begin, end in edges.tolist()]


@settings(patient, max_examples=amount(120, full=500))
@given(THEMES["everything"].worlds())
def test_extents_are_the_bytes_that_are_written(one: HandOff) -> None:
    """Check the extents of each source and of the whole window: exactly these bytes are granted."""
    layout, names = one.target.layout, oracle.Names()
    parts = shares([source.layout for source in one.sources], layout)
    for group, (start, stop) in one.windows.items():
        begin = one.begins[group]
        pages = one.target.pages(group, begin, stop)
        wanted = oracle.blank(layout)
        oracle.fill(wanted, names, layout, pages, begin, (start, stop), group)
        granted = extents(layout, pages, start, stop, pages_start=begin, group=group)
        assert oracle.as_ranges(granted) == ranges_of(wanted > 0)
        assert layout.window_nbytes(start, stop, group) == np.count_nonzero(wanted)
        for source, some in zip(one.sources, parts, strict=True):
            planner = Planner(source.layout, layout, some)
            blocks = planned(planner, source, one, Send(group, start, stop, start))
            written = np.zeros_like(wanted)
            oracle.apply(blocks, oracle.blank(source.layout), np.zeros_like(wanted), written)
            granted = planner.extents(pages, start, stop, pages_start=begin, group=group)
            assert oracle.as_ranges(granted) == ranges_of(written > 0)


@settings(patient, max_examples=amount(120, full=500))
@given(THEMES["everything"].worlds())
def test_strips_list_what_is_written_alike_on_both_sides(one: HandOff) -> None:
    names = oracle.Names()
    layout, after = one.target.layout, target_memory(one, names)
    for source, parts in zip(one.sources, shares([source.layout for source in one.sources], layout), strict=True):
        before = oracle.blank(source.layout)
        for group, (start, stop) in one.windows.items():
            oracle.fill(before, names, source.layout, source.pages(group, start, stop), start, (start, stop), group)
        ours, theirs = strips(source.layout, layout, parts)
        sent = [listed(before, source, one.target, strip, one.windows[strip.group]) for strip in ours]
        landed = [listed(after, one.target, source, strip, one.windows[strip.group]) for strip in theirs]
        assert sent == landed
        planner = Planner(source.layout, layout, parts)
        written = np.zeros_like(after)
        for group, (start, stop) in one.windows.items():
            blocks = planned(planner, source, one, Send(group, start, stop, start))
            oracle.apply(blocks, before, np.zeros_like(after), written)
        assert sorted(name for strip in sent for name in strip) == sorted(after[written > 0].tolist())


def listed(memory: oracle.Memory, rank: Rank, other: Rank, strip: Strip, window: tuple[int, int]) -> list[int]:
    """Return the bytes that a strip lists for the tokens that both ranks hold: by token, head and byte."""
    start, stop = window
    both = set(oracle.held(other.layout, strip.group, stop))
    numbers = oracle.page_numbers(rank.layout, strip.group, start, stop)
    pages = dict(zip(numbers, rank.pages(strip.group, start, stop), strict=True))
    return [
        int(memory[at + lane])
        for place, token in enumerate(oracle.held(rank.layout, strip.group, stop))
        if token >= start and token in both and token % strip.span == 0
        for head in range(strip.heads)
        for lane in range(strip.head_bytes)
        for at in [
            strip.base
            + pages[place // strip.page_tokens] * strip.page_stride
            + place % strip.page_tokens // strip.span * strip.token_stride
            + head * strip.head_stride
        ]
    ]

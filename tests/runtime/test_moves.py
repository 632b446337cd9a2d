"""From rooms to plans: the bytes that an offer opens, and the errors for pages that do not fit, before any transfer."""

from __future__ import annotations

import pytest

from kvroom.core.inputs import OfferPages, SendPages
from kvroom.core.messages import Window
from kvroom.errors import PlanError
from kvroom.plan import KVGroup, KVLayout, Planner, TokenSplit, array_regions
from kvroom.runtime.page_lists import check_chunk, extents

PAGE, TOKENS = 64, 4  # bytes and tokens of a page


def hybrid(split: TokenSplit | None = None, *, apart: int = 0) -> KVLayout:
    """A full layer and a sliding one (window 8), whose pages are `apart` bytes from each other; 0 means one pool."""
    shape, strides = (16, TOKENS, 16), (PAGE, 16, 1)
    full = array_regions(4096, shape, strides, "PTD", itemsize=1, components=("k",))
    sliding = array_regions(
        4096 + apart, shape, strides, "PTD", itemsize=1, layers=(1,), components=("k",), group="swa"
    )
    return KVLayout((*full, *sliding), "uint8", groups=(KVGroup(name="swa", window=8),), split=split)


def offer(pages: tuple[int, ...], window: tuple[int, ...]) -> OfferPages:
    return OfferPages(pages=pages, start=0, stop=12, nbytes=0, windows=(Window("swa", window),))


def test_groups_may_share_a_pool_and_what_is_opened_is_joined() -> None:
    layout = hybrid()
    opened = extents(Planner(layout, layout), layout, offer((0, 3, 5), (1, 4)))
    assert opened.address.tolist() == [4096, 4096 + 3 * PAGE]
    assert opened.length.tolist() == [2 * PAGE, 3 * PAGE]


def test_a_page_that_is_offered_in_two_groups_is_refused() -> None:
    layout = hybrid()
    with pytest.raises(PlanError, match="pages of two groups overlap in memory"):
        extents(Planner(layout, layout), layout, offer((0, 3, 5), (1, 5)))


def test_groups_apart_have_page_numbers_of_their_own() -> None:
    layout = hybrid(apart=16 * PAGE)
    opened = extents(Planner(layout, layout), layout, offer((0, 3, 5), (1, 5)))
    assert int(opened.length.sum()) == 5 * PAGE


@pytest.mark.parametrize(
    ("windows", "last", "message"),
    [
        ((), True, r"groups \[\]: the last chunk needs those of \['swa'\]"),
        ((Window("swa", (1, 2)),), False, "give windows with the last chunk"),
        ((Window("swa", (1,)),), True, r"1 source pages given, but tokens \[4, 12\) take 2 pages"),
        ((Window("ssm", (1,)),), True, "no group 'ssm'"),
    ],
)
def test_windows_that_do_not_fit_are_refused(windows: tuple[Window, ...], last: bool, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_chunk(hybrid(), SendPages(pages=(0, 3, 5), stop=12, last=last, start=0, windows=windows))


def test_of_ranks_that_split_the_tokens_one_brings_the_window() -> None:
    layout = hybrid(TokenSplit(rank=0, size=2))
    check_chunk(layout, SendPages(pages=(0, 3, 5), stop=12, last=True, start=0))
    check_chunk(layout, SendPages(pages=(0, 3, 5), stop=12, last=True, start=0, windows=(Window("swa", (1, 2)),)))

"""The page list of one side, checked against the window, and the runs of tokens between the pages of two sides.

The law: a list begins at a given token of the request (`source_start`, `target_start`) and ends with the page that
holds the window's last token, so its length is determined. Any other length raises a `PlanError`; no list is cut short.
Page borders lie at multiples of that side's page size, counted in the tokens that the side holds from token 0 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvroom.errors import PlanError

from .blocks import U64
from .tokens import I64, MAX_TOKENS, PageTable, stretches

Pages = Sequence[int] | npt.NDArray[np.integer]


def sole_page(table: PageTable, pages: Pages, start: int, stop: int, list_start: int | None) -> int | None:
    """Return the page that holds the whole window if the list has no other page, else None; then use `SidePages`.

    In a small room each array counts, so the smallest ones are planned without `SidePages` and `Runs`.
    """
    begin = start if list_start is None else list_start
    if len(pages) != 1 or table.split is not None or not 0 <= begin <= start < stop <= MAX_TOKENS:
        return None
    page = pages[0]
    alone = table.pages and begin // table.page_tokens == (stop - 1) // table.page_tokens
    return page if alone and type(page) is int and 0 <= page < table.pages else None


class SidePages:
    """One side's page list, checked against the window."""

    def __init__(
        self, side: str, table: PageTable, pages: Pages, *, start: int, stop: int, list_start: int | None = None
    ) -> None:
        begin = start if list_start is None else list_start
        if not 0 <= begin <= start <= stop <= MAX_TOKENS:
            raise PlanError(
                f"invalid window: tokens [{start}, {stop}) with {side} pages from token {begin}; "
                f"0 <= first token of the pages <= start <= stop <= {MAX_TOKENS} is required"
            )
        self.side = side
        self.table = table
        self.first_page = table.place(begin) // table.page_tokens if table.pages else 0
        numbers = np.asarray(pages)
        if numbers.size and (numbers.ndim != 1 or numbers.dtype.kind not in "iu"):
            raise PlanError(f"{side} pages of type {numbers.dtype} and shape {numbers.shape}; give a list of ints")
        self.pages: npt.NDArray[np.integer] = numbers if numbers.size else np.empty(0, np.int64)
        expected = table.window_pages(begin, stop)
        if self.pages.size != expected:
            only = f" (only those of {table.split})" if table.split else ""
            raise PlanError(
                f"{self.pages.size} {side} pages given, but tokens [{begin}, {stop}){only} take {expected} pages "
                f"of {table.page_tokens} tokens"
            )
        if expected and (self.pages.min() < 0 or self.pages.max() >= table.pages):
            wrong = self.pages[(self.pages < 0) | (self.pages >= table.pages)][0]
            raise PlanError(f"{side} page {wrong} is not in the {side}'s pool of pages [0, {table.pages})")

    def check_distinct(self) -> None:
        """Raise `PlanError` if a page occurs twice: it would be written twice."""
        if self.pages.size < 2:
            return
        ordered = np.sort(self.pages)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise PlanError(f"{self.side} page {repeated[0]} occurs twice; each page can hold one part of the request")

    def locate(self, places: I64) -> tuple[U64, I64]:
        """Return the page number, and the position in the page, of each place."""
        page, token = np.divmod(places, self.table.page_tokens)
        return self.pages[page - self.first_page].astype(np.uint64), token


class Runs(NamedTuple):
    """Runs by target page. Run i is `length[i]` tokens, from `src_token[i]` of `src_page[i]` to those of the target."""

    src_page: U64
    dst_page: U64
    src_token: I64
    dst_token: I64
    length: I64


def runs(source: SidePages, target: SidePages, start: int, stop: int, owner: PageTable | None = None) -> Runs:
    """Cut the tokens of [start, stop) that both sides (and `owner`) hold at each page border of either side.

    Sides that hold the same tokens have equal places for them, so in that case places are cut instead of tokens.
    """
    one, other = source.table, target.table if owner is None else owner
    if one.split == other.split:
        start, stop = one.place(start), one.place(stop)
        begin, length = stretches(start, stop, one._replace(split=None), other._replace(split=None))
        src_place = dst_place = begin
    else:
        begin, length = stretches(start, stop, one, other)
        src_place, dst_place = one.places(begin), target.table.places(begin)
    src_page, src_token = source.locate(src_place)
    dst_page, dst_token = target.locate(dst_place)
    found = Runs(src_page, dst_page, src_token, dst_token, length)
    if (dst_page[1:] >= dst_page[:-1]).all():
        return found
    order = np.argsort(dst_page, kind="stable")
    return Runs(src_page[order], dst_page[order], src_token[order], dst_token[order], length[order])

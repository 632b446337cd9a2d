"""The places of a request's tokens: page tables, windows, and the split of tokens among several ranks.

The law: a rank packs its tokens densely, in their order. Token t lies at the place `place(t)`, the number of tokens
before t that the rank holds, and a page is `page_tokens` places. For a rank that holds every token, place(t) = t, and
page borders lie at multiples of `page_tokens` counted from token 0 of the request.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvroom.errors import LayoutError

I64 = npt.NDArray[np.int64]

MAX_TOKENS = 2**48
MAX_RANKS = 2**12
MAX_INTERLEAVE = 2**20
MAX_NAME_CHARS = 256


class TokenSplit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The tokens of a request that one of several context-parallel ranks holds.

    Raises:
        LayoutError: a number is out of range.
    """

    rank: int
    """The rank that this split is about, in [0, size)."""
    size: int
    """Ranks that hold the tokens of a request together."""
    interleave: int = 0
    """Above 0 (decode context parallel): rank r holds each token t with `(t // interleave) % size == r`, packed in its
    pages. 0: the tokens are cut in another way (contiguous, zigzag), the engine names the tokens of each send, and page
    borders are those of the whole request."""

    def __post_init__(self) -> None:
        numbers = (self.rank, self.size, self.interleave)
        sound = all(type(n) is int for n in numbers) and 0 <= self.rank < self.size <= MAX_RANKS
        if not sound or not 0 <= self.interleave <= MAX_INTERLEAVE:
            raise LayoutError(
                f"invalid token split: rank {self.rank!r} of {self.size!r}, interleave {self.interleave!r}; "
                f"0 <= rank < size <= {MAX_RANKS} and 0 <= interleave <= {MAX_INTERLEAVE} are required"
            )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}, interleave {self.interleave}"

    def meets(self, other: TokenSplit) -> bool:
        """Return True if both ranks can hold the same token, for a request that is long enough.

        Each rank holds its tokens periodically; all offsets between two periods are multiples of their greatest common
        divisor away from each other.
        """
        if not self.interleave or not other.interleave:
            return True
        common = math.gcd(self.interleave * self.size, other.interleave * other.size)
        apart = other.rank * other.interleave - self.rank * self.interleave
        return apart % common < self.interleave or -apart % common < other.interleave


class KVGroup(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A group of regions with a page table of its own, apart from the main group (whose name is "").

    A state that is kept once for each request (conv, ssm, a ring buffer) is a group with window 1 whose regions have
    `page_tokens` 1: its page is the request's slot, and it counts as the request's last token.

    Raises:
        LayoutError: the name is empty or too long, or the window is out of range.
    """

    name: str
    """The name that regions give in `KVRegion.group`, 1 to 256 characters."""
    window: int = 0
    """Number of a request's last tokens that are kept and moved (sliding window); 0 for every token."""

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_CHARS:
            raise LayoutError(f"group {self.name[:MAX_NAME_CHARS]!r}: a name must be 1 to {MAX_NAME_CHARS} characters")
        if type(self.window) is not int or not 0 <= self.window <= MAX_TOKENS:
            raise LayoutError(
                f"group {self.name!r}: window is {self.window!r}; give an int from 0 (every token) to {MAX_TOKENS}"
            )


class PageTable(NamedTuple):
    """The page table of one group on one side: the rules by which its page lists are read.

    Windows begin at multiples of `span` tokens. `split` is None unless tokens interleave. Without regions, `pages` and
    `page_tokens` are 0, and no window takes any page.
    """

    page_tokens: int
    pages: int
    span: int
    window: int
    split: TokenSplit | None

    def place(self, token: int) -> int:
        """Return the number of tokens before this one that this side holds: its place, if this side holds it."""
        split = self.split
        if split is None:
            return token
        rounds, rest = divmod(token, split.interleave * split.size)
        return rounds * split.interleave + min(max(rest - split.rank * split.interleave, 0), split.interleave)

    def places(self, tokens: I64) -> I64:
        """Return the places of tokens, all of which this side holds."""
        if self.split is None:
            return tokens
        rounds, rest = np.divmod(tokens, self.split.interleave * self.split.size)
        found: I64 = rounds * self.split.interleave + rest % self.split.interleave
        return found

    def holds(self, tokens: I64) -> npt.NDArray[np.bool_]:
        """Return a mask of the tokens that this side holds."""
        if self.split is None:
            return np.ones(tokens.shape, np.bool_)
        held: npt.NDArray[np.bool_] = tokens // self.split.interleave % self.split.size == self.split.rank
        return held

    def window_start(self, stop: int) -> int:
        """Return the first token that is kept of a request of `stop` tokens, a multiple of `span`."""
        return max(0, stop - self.window) // self.span * self.span if self.window else 0

    def window_pages(self, start: int, stop: int) -> int:
        """Return the number of pages that hold this side's tokens of [start, stop)."""
        first, last = self.place(start), self.place(stop)
        return -(-last // self.page_tokens) - first // self.page_tokens if last > first and self.pages else 0

    def borders(self, start: int, stop: int) -> I64:
        """Return the tokens in (start, stop) at which a page or a held stretch begins or ends; sorted."""
        size, split = self.page_tokens, self.split
        if split is None:
            return np.arange((start // size + 1) * size, stop, size, dtype=np.int64)
        first, last = self.place(start), self.place(stop)
        step = split.interleave
        chunks = np.arange(first // step, -(-last // step), dtype=np.int64) * step
        begins = self._tokens(chunks)
        pages = self._tokens(np.arange((first // size + 1) * size, last, size, dtype=np.int64))
        every = np.unique(np.concatenate((begins, begins + step, pages)))
        return every[(every > start) & (every < stop)]

    def _tokens(self, places: I64) -> I64:
        """Return the tokens at these places: the inverse of `places`."""
        assert self.split is not None
        chunk, rest = np.divmod(places, self.split.interleave)
        return (chunk * self.split.size + self.split.rank) * self.split.interleave + rest


def stretches(start: int, stop: int, one: PageTable, other: PageTable) -> tuple[I64, I64]:
    """Return begins and lengths of the stretches of [start, stop) that both hold, cut at the page borders of both."""
    inner = one.borders(start, stop)
    if one[:2] != other[:2] or one.split != other.split:
        inner = np.union1d(inner, other.borders(start, stop))
    cuts = np.concatenate(([start], inner, [stop]))
    begin = cuts[:-1] if stop > start else cuts[:0]
    length = cuts[1 : begin.size + 1] - begin
    if one.split is None and other.split is None:
        return begin, length
    both = one.holds(begin) & other.holds(begin)
    return begin[both], length[both]

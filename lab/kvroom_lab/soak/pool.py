"""A pool in which every byte has a known content: that of one room, of a free page, or of the guards between pages.

A returned page is filled as free immediately, and is compared when it is taken again, so that a byte which lands in
between, or outside the offered tokens, is counted as wrong. Pages are taken last in, first out, so that a freed page is
the next one in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvroom.plan import KVLayout, array_regions
from kvroom.plan.blocks import U64
from kvroom.transports.kit.pool import allocate

from .mix import PAGE_TOKENS

_LAYERS, _HEADS, _HEAD_WORDS = 2, 2, 8
_SHAPE = (_LAYERS, 2, PAGE_TOKENS, _HEADS, _HEAD_WORDS)
_WORDS = int(np.prod(_SHAPE))
_GUARD_WORDS = 8
_ROW_WORDS = _WORDS + _GUARD_WORDS
_FREE = np.uint64(0xF4EEF4EEF4EEF4EE)
_GUARD = np.uint64(0x6A4D6A4D6A4D6A4D)
_PAGE_STEP = 0x9E3779B97F4A7C15
_RAMP = np.arange(_WORDS, dtype=np.uint64).reshape(_SHAPE) * np.uint64(0xD1342543DE82EF95)

Words = npt.NDArray[np.uint64]


class SoakPool:
    """`pages` pages of 8 KiB, a guard of 64 bytes behind each and before the first. Close it after use."""

    def __init__(self, pages: int) -> None:
        self._memory = allocate((_GUARD_WORDS + pages * _ROW_WORDS) * 8, huge=False)
        words = np.frombuffer(self._memory.buffer, np.uint64)
        words[:] = _GUARD
        self._front: U64 = words[:_GUARD_WORDS]
        self._rows: Words = words[_GUARD_WORDS:].reshape(pages, _ROW_WORDS)
        self._pages: Words = self._rows[:, :_WORDS].reshape(pages, *_SHAPE)
        self._pages[:] = _FREE
        self._free_row: U64 = np.full(_ROW_WORDS, _GUARD)
        self._free_row[:_WORDS] = _FREE
        self._unused = list(range(pages))
        self.total = pages
        self.checked_bytes = 0
        self.wrong_bytes = 0
        base = self._memory.address + _GUARD_WORDS * 8
        regions = array_regions(
            base, (pages, *_SHAPE[:-1], _HEAD_WORDS * 8), (*self._pages.strides[:-1], 1), "PLCTHD",
            itemsize=1, layers=range(_LAYERS),
        )  # fmt: skip
        self.layout = KVLayout(regions, dtype="uint8")

    @property
    def free(self) -> int:
        """Return the number of free pages."""
        return len(self._unused)

    def take(self, count: int) -> list[int]:
        """Take `count` pages, at most `free`. Bytes that landed in them while they were free count as wrong."""
        border = len(self._unused) - count
        pages = self._unused[border:]
        del self._unused[border:]
        self._compare(self._rows[pages], self._free_row)
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Return pages. No peer may write into them from now on."""
        self._pages[pages] = _FREE
        self._unused += pages

    def write(self, pages: Sequence[int], stamp: int) -> None:
        """Fill the pages of a request from its token 0 on, as a prefill does."""
        np.add(_RAMP, _bases(stamp, 0, len(pages)), out=(filled := np.empty((len(pages), *_SHAPE), np.uint64)))
        self._pages[pages] = filled

    def check(self, pages: Sequence[int], stamp: int, start: int, stop: int) -> None:
        """Compare pages with tokens [start, stop) of a request; the first page holds token `start`.

        All bytes outside that window, and the guards, must be as `take` left them.
        """
        if not pages:
            return
        expected = np.tile(self._free_row, (len(pages), 1))
        inside = expected[:, :_WORDS].reshape(len(pages), *_SHAPE)
        first = start // PAGE_TOKENS
        inside[:] = _RAMP + _bases(stamp, first, len(pages))
        inside[0, :, :, : start - first * PAGE_TOKENS] = _FREE
        inside[-1, :, :, stop - (first + len(pages) - 1) * PAGE_TOKENS :] = _FREE
        self._compare(self._rows[pages], expected)

    def check_rest(self) -> None:
        """Compare everything that no room holds: the free pages and every guard."""
        self._compare(self._rows[self._unused], self._free_row)
        self._compare(self._rows[:, _WORDS:], self._free_row[_WORDS:])
        self._compare(self._front, self._free_row[_WORDS:])

    def close(self) -> None:
        """Free the memory."""
        del self._front, self._rows, self._pages
        self._memory.close()

    def _compare(self, found: Words, expected: Words) -> None:
        self.checked_bytes += found.nbytes
        if not (found == expected).all():
            self.wrong_bytes += int((found ^ expected).view(np.uint8).astype(bool).sum())


def _bases(stamp: int, first: int, count: int) -> Words:
    """Return, for each of `count` pages of a request from its page `first` on, the number that is added to the ramp."""
    steps = np.arange(first, first + count, dtype=np.uint64) * np.uint64(_PAGE_STEP)
    bases: Words = (np.uint64(stamp) + steps).reshape(-1, *[1] * len(_SHAPE))
    return bases

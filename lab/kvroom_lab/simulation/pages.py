"""An engine's pool and its page allocator, which records the owner of each page.

A page that is returned is allocated again before any other. A write that comes too late therefore hits a page with a
new owner, and is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvroom_lab.pools import TestPool

Bytes = npt.NDArray[np.uint8]
LAYERS, HEADS, HEAD_BYTES = 2, 1, 4
_CONTENT = np.random.default_rng(7).integers(0, 256, 1 << 16, np.uint8)


class Allocation:
    """The pages of one request."""

    def __init__(self, name: str, pages: tuple[int, ...]) -> None:
        self.name, self.pages = name, pages
        self.writable = False
        """True from the offer of the pages until their room releases them."""
        self.checked = False
        """True if the pages were offered with a checksum."""
        self.returned = False


class Pages:
    """The pool of one process and its free pages."""

    def __init__(self, count: int, page_tokens: int) -> None:
        self.pool = TestPool(layers=LAYERS, pages=count, page_tokens=page_tokens, heads=HEADS, head_bytes=HEAD_BYTES)
        self.count, self.page_tokens = count, page_tokens
        self.owner: dict[int, Allocation] = {}
        self._free = list(range(count))
        self._start = self.pool.memory.address
        self._page_bytes = page_tokens * HEADS * HEAD_BYTES

    def take(self, name: str, tokens: int) -> Allocation | None:
        """Return pages for this number of tokens, the ones returned last first; None if there are too few."""
        need = -(-tokens // self.page_tokens)
        if need > len(self._free):
            return None
        allocation = Allocation(name, tuple(self._free.pop() for _ in range(need)))
        for page in allocation.pages:
            self.owner[page] = allocation
        return allocation

    def give_back(self, allocation: Allocation) -> None:
        allocation.returned = True
        for page in allocation.pages:
            del self.owner[page]
            self._free.append(page)

    @property
    def whole(self) -> bool:
        """Return whether every page is free, exactly once."""
        return not self.owner and sorted(self._free) == list(range(self.count))

    def pages_at(self, address: int, nbytes: int) -> set[int]:
        """Return the pages in which these bytes lie."""
        first = (address - self._start) // self._page_bytes
        last = (address - self._start + nbytes - 1) // self._page_bytes
        return {place % self.count for place in range(first, last + 1)}

    # -- bytes ----------------------------------------------------------------------------------------------------

    def put(self, pages: Sequence[int], first_token: int, start: int, content: Bytes) -> None:
        """Write tokens [start, start + n). `pages[0]` holds token `first_token`, which begins a page."""
        slots = self.pool.array
        for i in range(content.shape[2]):
            index, slot = divmod(start + i - first_token, self.page_tokens)
            slots[:, :, pages[index], slot] = content[:, :, i]

    def get(self, pages: Sequence[int], first_token: int, start: int, stop: int) -> Bytes:
        return self.pool.tokens(pages, stop - first_token)[:, :, start - first_token :]


def content(label: int, tokens: int) -> Bytes:
    """Return the KV of one request: the same for the same label, and different for every token."""
    token_bytes = LAYERS * 2 * HEADS * HEAD_BYTES
    start = label * 7919 % (_CONTENT.size - tokens * token_bytes)
    flat = _CONTENT[start : start + tokens * token_bytes]
    kv: Bytes = flat.reshape(tokens, LAYERS, 2, HEADS, HEAD_BYTES).transpose(1, 2, 0, 3, 4)
    return kv

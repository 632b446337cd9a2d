"""The prefix index: finds a page by a hash of all tokens up to the end of the page.

    key(page i) = blake2b(key(page i - 1) + tokens of page i),  key(page -1) = blake2b(everything else that must agree)

One key therefore identifies a whole prefix, and two prompts share pages exactly as far as they are equal. Only full
pages have keys. A page enters the index only when its contents are final, and is read-only while it is in the index.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class PageKeys(NamedTuple):
    """A scheme of keys for pages of `page_tokens` tokens. `root` is a hash of everything else that must agree."""

    root: bytes
    page_tokens: int

    @classmethod
    def agreeing(cls, *what: object, page_tokens: int) -> PageKeys:
        """Return a scheme whose keys are equal only if all of `what` is: the model, its weights, the element type."""
        return cls(_hash(repr((what, page_tokens)).encode()), page_tokens)

    def salted(self, salt: str) -> PageKeys:
        """Return a scheme whose keys differ from those of any other salt. "" means no salt."""
        return self._replace(root=_hash(self.root + salt.encode("utf-8", "surrogatepass"))) if salt else self

    def of(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """Return the keys of the full pages of `tokens`, in order. `known` are the keys of the first pages, if any."""
        keys = list(known)
        ids = np.asarray(tokens, dtype="<i8")
        for first in range(len(keys) * self.page_tokens, len(ids) - self.page_tokens + 1, self.page_tokens):
            parent = keys[-1] if keys else self.root
            keys.append(_hash(parent + ids[first : first + self.page_tokens].tobytes()))
        return tuple(keys)


class PrefixIndex:
    """A map from key to page, with the evictable pages in the order of their last use.

    Each key has at most one page: the one that was committed first.
    """

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # pages without holder, least recently used first

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def __len__(self) -> int:
        return len(self._key_of)

    @property
    def pages(self) -> Iterable[int]:
        """All pages in the index."""
        return self._key_of.keys()

    @property
    def evictable(self) -> Iterable[int]:
        """The pages that no lease and no room holds, the next one to be evicted first."""
        return self._evictable.keys()

    @property
    def evictable_count(self) -> int:
        """Number of evictable pages. May be read from any thread."""
        return len(self._evictable)

    def match(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Return the pages of the longest prefix of `keys` that is in the index."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def commit(self, page: int, key: bytes) -> None:
        """Add `page` under `key`. Does nothing if the key or the page is in the index already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def mark_evictable(self, page: int) -> None:
        """Allow the eviction of a page, after all pages that are evictable already."""
        self._evictable[page] = None

    def mark_used(self, page: int) -> None:
        """Forbid the eviction of a page. Does nothing if it was not evictable."""
        self._evictable.pop(page, None)

    def evict(self) -> int:
        """Remove the least recently used evictable page and return it. Raises `KeyError` if there is none."""
        page, _ = self._evictable.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()

"""Which page holds which tokens: a page is found again by a hash of all tokens up to its end.

    key(page i) = blake2b(key(page i - 1) + tokens of page i),  key(page -1) = blake2b(what else must agree)

So one key names a whole prefix, and two prompts share pages exactly as far as they are equal. Only full pages have
keys. A page is filed here only when its contents are certain, and is never written again while it is filed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class PageKeys(NamedTuple):
    """How keys are made: `root` stands for what else must agree, `page_tokens` is the size of a page."""

    root: bytes
    page_tokens: int

    @classmethod
    def agreeing(cls, *what: object, page_tokens: int) -> PageKeys:
        """Keys that are equal only where all of `what` is: the model, its weights, the element type."""
        return cls(_hash(repr((what, page_tokens)).encode()), page_tokens)

    def salted(self, salt: str) -> PageKeys:
        """Return keys that differ from those of any other salt; "" stands for none."""
        return self._replace(root=_hash(self.root + salt.encode("utf-8", "surrogatepass"))) if salt else self

    def of(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> tuple[bytes, ...]:
        """The keys of the full pages of `tokens`, in order; `known` are those of the first ones."""
        keys = list(known)
        ids = np.asarray(tokens, dtype="<i8")
        for first in range(len(keys) * self.page_tokens, len(ids) - self.page_tokens + 1, self.page_tokens):
            parent = keys[-1] if keys else self.root
            keys.append(_hash(parent + ids[first : first + self.page_tokens].tobytes()))
        return tuple(keys)


class PrefixIndex:
    """Key -> page, and which of these pages nobody uses. At most one page has a key; the first one keeps it."""

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()  # pages nobody uses, least recently used first

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def __len__(self) -> int:
        return len(self._key_of)

    @property
    def pages(self) -> Iterable[int]:
        """Every page that is filed."""
        return self._key_of.keys()

    @property
    def resting(self) -> Iterable[int]:
        """Those that nobody uses, the next to be evicted first."""
        return self._resting.keys()

    @property
    def resting_count(self) -> int:
        """How many they are; may be read from any thread."""
        return len(self._resting)

    def match(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """The pages of the longest run of `keys`, from the first one on, that are filed."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def file(self, page: int, key: bytes) -> None:
        """`page` holds for good what `key` names. Nothing happens if another page does already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def rest(self, page: int) -> None:
        """Nobody uses this page now: it is evicted after those that rest already."""
        self._resting[page] = None

    def wake(self, page: int) -> None:
        """Somebody uses this page. Nothing happens if it did not rest."""
        self._resting.pop(page, None)

    def evict(self) -> int:
        """Forget the page that has rested longest, and return it. `KeyError` when none rests."""
        page, _ = self._resting.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()

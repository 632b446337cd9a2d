"""The pages of one request, from the moment that it gets them until neither the engine nor a room holds them.

A lease begins with pages that the prefix index knows: others may read them too, so nobody writes them. The pages after
them are its own, and stay so until `file` says that their contents are certain. Pages of sliding windows and slots of
states are its own always.
"""

from __future__ import annotations

from collections.abc import Sequence

from .attention import Chunk
from .pages import PageBook
from .pool import SLIDING, STATE, PagedPool


class Lease:
    """`pages` in order of the tokens that they hold; the first `shared` of them were in the cache."""

    def __init__(self, pool: PagedPool) -> None:
        self.pages: tuple[int, ...] = ()
        self.shared = 0
        self._others: dict[str, tuple[int, ...]] = {}  # pages of the other groups
        self._pool = pool
        self._filed = 0
        self._lent_from: int | None = None
        self._dropped = False

    @property
    def cached_tokens(self) -> int:
        """Tokens, from the first one on, whose keys and values were in the pages when they were taken."""
        return self.shared * self._pool.page_tokens

    def take(self, tokens: int, keys: Sequence[bytes] = ()) -> bool:
        """Own pages for `tokens` tokens, once; the first ones shared, as far as `keys` are in the cache.

        False and nothing when not so many are free now.
        """
        shared = self._pool.book.match(keys)
        taken: dict[str, tuple[int, ...]] = {}
        for group, count in self._pool.needs(tokens).items():
            pages = self._pool.books[group].allocate(count, () if group else shared)
            if pages is None:
                for name, had in taken.items():
                    self._pool.books[name].release(had)
                return False
            taken[group] = pages
        self.pages = taken.pop("")
        self._others = taken
        self.shared = self._filed = len(shared)
        return True

    def chunk(self, tokens: Sequence[int], start: int) -> Chunk:
        """`tokens` from position `start` on, with the pages that they go to."""
        return Chunk(tokens, start, self.pages, self._others.get(SLIDING, ()), self._others.get(STATE, (0,))[0])

    def windows(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """For each other group the pages that hold what is kept of a request that has come to `tokens` tokens."""
        windows = dict(self._others)
        if self._pool.sliding is not None:
            ring, first = windows[SLIDING], max(0, tokens - self._pool.sliding.window) // self._pool.page_tokens
            indices = range(first, self._pool.pages_for(tokens))
            windows[SLIDING] = tuple(ring[index % len(ring)] for index in indices)
        return windows

    def file(self, keys: Sequence[bytes]) -> None:
        """The page of each key holds its tokens for good: others may share it from now on."""
        if len(keys) > self._filed:
            self._pool.book.file(self.pages[self._filed : len(keys)], keys[self._filed :])
            self._filed = len(keys)

    def lend(self, first: int = 0) -> None:
        """A room was opened that may be told of `pages[first:]`, and of all that is in other groups.

        It holds them until it gives them back.
        """
        self._lent_from = first

    def give_back(self) -> None:
        """The room will never touch them again."""
        if self._lent_from is not None and self._dropped:
            for book, pages in self._split(self._lent_from)[1]:
                book.restore(pages)
        self._lent_from = None

    def drop(self) -> None:
        """The engine has no more use for them. Idempotent."""
        if self._dropped:
            return
        self._dropped = True
        kept, lent = self._split(self._lent_from)
        for book, pages in lent:
            book.quarantine(pages)
        for book, pages in kept:
            book.release(pages)

    def _split(self, lent_from: int | None) -> tuple[_Holdings, _Holdings]:
        """What no room was told of, and what one was."""
        main = self._pool.book
        others = [(self._pool.books[name], pages) for name, pages in self._others.items()]
        if lent_from is None:
            return [(main, self.pages), *others], []
        return [(main, self.pages[:lent_from])], [(main, self.pages[lent_from:]), *others]


_Holdings = list[tuple[PageBook, tuple[int, ...]]]

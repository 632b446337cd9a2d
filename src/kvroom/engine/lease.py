"""The pages of one request, from their allocation until neither the engine nor a room uses them.

The first pages of a lease come from the prefix index. Other requests may read them at the same time, so no request
writes them. The pages after them belong to this lease alone until `commit` publishes them to the index. The pages of
sliding windows and the slots of states always belong to one lease alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from .attention import Chunk
from .pages import PageBook
from .pool import SLIDING, STATE, PagedPool


class Lease:
    """The pages of one request: `pages` in token order, of which the first `shared` come from the prefix cache."""

    def __init__(self, pool: PagedPool) -> None:
        self.pages: tuple[int, ...] = ()
        self.shared = 0
        self._others: dict[str, tuple[int, ...]] = {}  # pages of the other groups
        self._pool = pool
        self._committed = 0
        self._room_from: int | None = None
        self._dropped = False

    @property
    def cached_tokens(self) -> int:
        """Number of leading tokens whose keys and values were in the cache when the pages were taken."""
        return self.shared * self._pool.page_tokens

    def take(self, tokens: int, keys: Sequence[bytes] = ()) -> bool:
        """Allocate pages for `tokens` tokens; the first ones are shared, as far as the cache holds `keys`.

        Call it at most once successfully. Returns False, and changes nothing, if too few pages are free now.
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
        self.shared = self._committed = len(shared)
        return True

    def chunk(self, tokens: Sequence[int], start: int) -> Chunk:
        """Return the chunk of `tokens` at position `start`, with the pages that hold it."""
        return Chunk(tokens, start, self.pages, self._others.get(SLIDING, ()), self._others.get(STATE, (0,))[0])

    def windows(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return, for each group except the main one, the pages that a request of `tokens` tokens hands over."""
        windows = dict(self._others)
        if self._pool.sliding is not None:
            ring, first = windows[SLIDING], max(0, tokens - self._pool.sliding.window) // self._pool.page_tokens
            indices = range(first, self._pool.pages_for(tokens))
            windows[SLIDING] = tuple(ring[index % len(ring)] for index in indices)
        return windows

    def commit(self, keys: Sequence[bytes]) -> None:
        """Publish the first `len(keys)` pages to the prefix index. They are read-only from now on."""
        if len(keys) > self._committed:
            self._pool.book.commit(self.pages[self._committed : len(keys)], keys[self._committed :])
            self._committed = len(keys)

    def attach_room(self, first: int = 0) -> None:
        """Record that a room may touch `pages[first:]` and the pages of all other groups, until `detach_room`."""
        self._room_from = first

    def detach_room(self) -> None:
        """Record that the room can no longer touch any page. Pages in quarantine become free, or cached."""
        if self._room_from is not None and self._dropped:
            for book, pages in self._split(self._room_from)[1]:
                book.restore(pages)
        self._room_from = None

    def drop(self) -> None:
        """End the engine's use of the pages. Those that a room may touch go to quarantine. Idempotent."""
        if self._dropped:
            return
        self._dropped = True
        kept, exposed = self._split(self._room_from)
        for book, pages in exposed:
            book.quarantine(pages)
        for book, pages in kept:
            book.release(pages)

    def _split(self, room_from: int | None) -> tuple[_Holdings, _Holdings]:
        """Split the holdings into those that no room can touch and those that a room may touch."""
        main = self._pool.book
        others = [(self._pool.books[name], pages) for name, pages in self._others.items()]
        if room_from is None:
            return [(main, self.pages), *others], []
        return [(main, self.pages[:room_from])], [(main, self.pages[room_from:]), *others]


_Holdings = list[tuple[PageBook, tuple[int, ...]]]

"""The holder of each page: the leases that use it, a room that may still touch it, the prefix index, or none of them.

    free + cached + owned + quarantined == pages, always: `check` recounts them.

- *owned*: at least one lease uses the page. A page with several leases is in the prefix index, and is read-only.
- *quarantined*: no lease uses the page, but the room of an earlier lease may still read or write it.
- *cached*: neither of these, but the page is in the prefix index. When no free page is left, cached pages are evicted
  and reused, the least recently used one first.

Only the engine's thread may change a book. Any thread may call `counts`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from kvroom.errors import KVRoomError

from .prefix import PrefixIndex


class PoolCounts(msgspec.Struct, frozen=True):
    """Number of pages by holder; the parts add up to `pages`."""

    pages: int
    free: int
    cached: int
    owned: int
    quarantined: int

    @property
    def whole(self) -> bool:
        """True if no lease and no room holds a page, so all pages can be allocated."""
        return self.free + self.cached == self.pages


class PageBook:
    """The pages [0, pages) of one page table, with the holder of each."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.evicted = 0
        """Number of cached pages that were reused for other contents since the start."""
        # A heap that yields low pages first: the pages of a request are then often adjacent and move as one block.
        self._free = list(range(pages))
        self._index = PrefixIndex()
        self._owned: set[int] = set()
        self._quarantined: set[int] = set()
        self._users: Counter[int] = Counter()  # page -> number of leases that use it; absent instead of 0
        # page -> number of dropped leases whose room may still touch the page; absent instead of 0
        self._undrained: Counter[int] = Counter()

    def allocate(self, count: int, shared: Sequence[int] = ()) -> tuple[int, ...] | None:
        """Allocate `count` pages for one lease: the pages `shared`, which `match` returned, and others to write.

        Returns the shared pages first. Returns None, and changes nothing, if too few pages can be allocated now.
        """
        # Evictable pages that this request shares cannot be evicted for it as well.
        evictable = self._index.evictable_count - sum(page in self._index.evictable for page in shared)
        if count - len(shared) > len(self._free) + evictable:
            return None
        for page in shared:
            self._use(page)
        others: list[int] = []
        while len(others) < count - len(shared):
            if self._free:
                others.append(heapq.heappop(self._free))
            else:
                self.evicted += 1
                others.append(self._index.evict())
        for page in others:
            self._use(page)
        return (*shared, *others)

    def match(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Return the pages of the longest prefix of `keys` that is in the index."""
        return self._index.match(keys)

    def commit(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Publish the full page `pages[i]` to the prefix index under `keys[i]`. A published page is read-only.

        A page whose key another page already has stays private to its lease. Raises `KVRoomError`, and publishes
        nothing, if no lease uses one of the pages.
        """
        self._check_owned(pages)
        for page, key in zip(pages, keys, strict=True):
            self._index.commit(page, key)

    def check_writable(self, pages: Iterable[int]) -> None:
        """Raise `KVRoomError` if one of `pages` is in the prefix index: other requests may read it."""
        published = [page for page in pages if page in self._index]
        if published:
            raise KVRoomError(f"pages {published} are in the prefix index and must not be written")

    def release(self, pages: Sequence[int]) -> None:
        """End one lease's use of `pages`, which no room of that lease can touch."""
        self._check_owned(pages)
        self._drop_users(pages)

    def quarantine(self, pages: Sequence[int]) -> None:
        """End one lease's use of `pages`, which its room may still touch until `restore`."""
        self._check_owned(pages)
        self._undrained.update(pages)
        self._drop_users(pages)

    def restore(self, pages: Sequence[int]) -> None:
        """End the quarantine of `pages` for one room, which can no longer touch them."""
        missing = sorted(page for page in pages if not self._undrained[page])
        if missing:
            raise KVRoomError(f"pages {missing} are not quarantined")
        _count_down(self._undrained, pages)
        self._update_holders(pages)

    def drop_cache(self) -> int:
        """Free every cached page and return their number. Published pages that a lease or a room holds stay."""
        dropped = 0
        while self._index.evictable_count:
            heapq.heappush(self._free, self._index.evict())
            dropped += 1
        return dropped

    def counts(self) -> PoolCounts:
        """Return the number of pages of each holder."""
        cached = self._index.evictable_count
        return PoolCounts(self.pages, len(self._free), cached, len(self._owned), len(self._quarantined))

    def check(self) -> None:
        """Raise `KVRoomError` unless each page has exactly one holder, which follows from its leases and rooms."""
        index, cached = self._index, set(self._index.evictable)
        used, undrained = set(self._users), set(self._undrained)
        sound = (
            sorted([*self._free, *cached, *self._owned, *self._quarantined]) == list(range(self.pages))
            and self._owned == used
            and self._quarantined == undrained - used
            and all(page in index for page in cached)
            and not any(page in index for page in self._free)
            and all(page in index for page, users in self._users.items() if users > 1)
        )
        if not sound:
            raise KVRoomError(f"pages were lost or counted twice: {self.counts()}")

    def check_idle(self) -> None:
        """Raise `KVRoomError` unless every page is either free or cached."""
        self.check()
        if not self.counts().whole:
            raise KVRoomError(f"the pool is not idle: some pages are owned or quarantined: {self.counts()}")

    def _use(self, page: int) -> None:
        self._index.mark_used(page)
        self._users[page] += 1
        self._quarantined.discard(page)
        self._owned.add(page)

    def _check_owned(self, pages: Sequence[int]) -> None:
        missing = sorted(set(pages) - self._owned)
        if missing:
            raise KVRoomError(f"pages {missing} are not owned")

    def _drop_users(self, pages: Sequence[int]) -> None:
        _count_down(self._users, pages)
        self._update_holders(pages)

    def _update_holders(self, pages: Sequence[int]) -> None:
        """Assign each page to its holder after a lease or a room has ended its use."""
        # The last page becomes evictable first: without its first page, the rest of a prefix is unreachable.
        for page in reversed(pages):
            self._owned.discard(page)
            self._quarantined.discard(page)
            if self._users[page]:
                self._owned.add(page)
            elif self._undrained[page]:
                self._quarantined.add(page)
            elif page in self._index:
                self._index.mark_evictable(page)
            else:
                heapq.heappush(self._free, page)


def _count_down(counter: Counter[int], pages: Iterable[int]) -> None:
    for page in pages:
        counter[page] -= 1
        if not counter[page]:
            del counter[page]

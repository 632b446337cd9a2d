"""Who holds which page: leases that use it, rooms that may still touch it, the prefix index, or nobody.

    free + cached + owned + quarantined == pages, always: `check` recounts them.

- *owned*: at least one lease uses it. Several do only if it is in the prefix index, and then nobody writes it.
- *quarantined*: no lease uses it, but a room of one that did may still read or write it.
- *cached*: neither, but the prefix index knows its contents. It is given out again as if it were free, the one that was
  not used for longest first, when no free page is left.

Only the engine's thread calls into a book; counts may be read from anywhere.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from kvroom.errors import KVRoomError

from .prefix import PrefixIndex


class PoolCounts(msgspec.Struct, frozen=True):
    """Pages by holder."""

    pages: int
    free: int
    cached: int
    owned: int
    quarantined: int

    @property
    def whole(self) -> bool:
        """Whether nobody holds any page: all of them can be given out."""
        return self.free + self.cached == self.pages


class PageBook:
    """The pages [0, pages) of one page table and who holds each."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.evicted = 0
        """Cached pages that were given out for other contents, since the start."""
        self._free = list(range(pages))  # a heap: low pages first, so that a request's pages often lie together
        self._index = PrefixIndex()
        self._owned: set[int] = set()
        self._quarantined: set[int] = set()
        self._users: Counter[int] = Counter()  # leases that use a page; no entry for none
        self._parked: Counter[int] = Counter()  # dropped leases whose room may still touch it

    def allocate(self, count: int, shared: Sequence[int] = ()) -> tuple[int, ...] | None:
        """Own `count` pages: `shared`, which `match` has named, to read, and others to write.

        None, and nothing is changed, when not so many can be given out now.
        """
        sleeping = self._index.resting_count - sum(page in self._index.resting for page in shared)
        if count - len(shared) > len(self._free) + sleeping:
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
        """The pages that hold the longest run of `keys`, from the first one on."""
        return self._index.match(keys)

    def file(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """`pages[i]`, which a lease uses, holds for good what `keys[i]` names, and is written no more.

        A page whose contents another page has been filed for stays private.
        """
        self._check_owned(pages)
        for page, key in zip(pages, keys, strict=True):
            self._index.file(page, key)

    def check_writable(self, pages: Iterable[int]) -> None:
        """Raise `KVRoomError` if one of `pages` is filed: others read it, or will."""
        filed = [page for page in pages if page in self._index]
        if filed:
            raise KVRoomError(f"pages {filed} are in the prefix index and must not be written")

    def release(self, pages: Sequence[int]) -> None:
        """A lease that uses `pages`, and its room if it has one, needs them no more."""
        self._check_owned(pages)
        self._drop_users(pages)

    def quarantine(self, pages: Sequence[int]) -> None:
        """A lease that uses `pages` needs them no more, but its room may touch them until `restore`."""
        self._check_owned(pages)
        self._parked.update(pages)
        self._drop_users(pages)

    def restore(self, pages: Sequence[int]) -> None:
        """The room of `quarantine` will never touch them again."""
        missing = sorted(page for page in pages if not self._parked[page])
        if missing:
            raise KVRoomError(f"pages {missing} are not quarantined")
        _count_down(self._parked, pages)
        self._file_holders(pages)

    def drop_cache(self) -> int:
        """Free every cached page; how many they were. Pages in use stay shared."""
        dropped = 0
        while self._index.resting_count:
            heapq.heappush(self._free, self._index.evict())
            dropped += 1
        return dropped

    def counts(self) -> PoolCounts:
        """How many pages each holder has."""
        resting = self._index.resting_count
        return PoolCounts(self.pages, len(self._free), resting, len(self._owned), len(self._quarantined))

    def check(self) -> None:
        """Raise `KVRoomError` unless each page has one holder, the one that its users and rooms make it have."""
        index, resting = self._index, set(self._index.resting)
        used, parked = set(self._users), set(self._parked)
        sound = (
            sorted([*self._free, *resting, *self._owned, *self._quarantined]) == list(range(self.pages))
            and self._owned == used
            and self._quarantined == parked - used
            and all(page in index for page in resting)
            and not any(page in index for page in self._free)
            and all(page in index for page, users in self._users.items() if users > 1)
        )
        if not sound:
            raise KVRoomError(f"pages were lost or counted twice: {self.counts()}")

    def check_idle(self) -> None:
        """Raise `KVRoomError` unless every page is free or cached, each of them once."""
        self.check()
        if not self.counts().whole:
            raise KVRoomError(f"the pool is not whole: {self.counts()}")

    def _use(self, page: int) -> None:
        self._index.wake(page)
        self._users[page] += 1
        self._quarantined.discard(page)
        self._owned.add(page)

    def _check_owned(self, pages: Sequence[int]) -> None:
        missing = sorted(set(pages) - self._owned)
        if missing:
            raise KVRoomError(f"pages {missing} are not owned")

    def _drop_users(self, pages: Sequence[int]) -> None:
        _count_down(self._users, pages)
        self._file_holders(pages)

    def _file_holders(self, pages: Sequence[int]) -> None:
        """Say who holds them now. The last page rests first, so that of a prefix its end is evicted first."""
        for page in reversed(pages):
            self._owned.discard(page)
            self._quarantined.discard(page)
            if self._users[page]:
                self._owned.add(page)
            elif self._parked[page]:
                self._quarantined.add(page)
            elif page in self._index:
                self._index.rest(page)
            else:
                heapq.heappush(self._free, page)


def _count_down(counter: Counter[int], pages: Iterable[int]) -> None:
    for page in pages:
        counter[page] -= 1
        if not counter[page]:
            del counter[page]

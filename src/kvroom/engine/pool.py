"""The paged KV pool: one tensor, and who holds which page of it.

    free + owned + quarantined == pages, always: `check` recounts them, `check_idle` says whether all of them are free.

A page is *quarantined* while its request is over but a room may still read or write it: nobody gets it before the room
gives it back. Only the engine's thread calls into a pool; counts may be read from anywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import msgspec
import torch

from kvroom.engine.attention import KVShape
from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError
from kvroom.plan.layout import KVLayout, array_regions
from kvroom.transports.pool import allocate


class PoolCounts(msgspec.Struct, frozen=True):
    """Pages by holder."""

    pages: int
    free: int
    owned: int
    quarantined: int


class PagedPool:
    """`data` is [layers, 2 (key, value), pages, page_tokens, kv_heads, head_dim], zeroed, on `device`."""

    def __init__(
        self, shape: KVShape, *, pages: int, page_tokens: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        if pages < 1 or page_tokens < 1:
            raise ConfigurationError(f"a pool of {pages} pages of {page_tokens} tokens: both must be positive")
        self.pages = pages
        self.page_tokens = page_tokens
        sizes = (shape.layers, 2, pages, page_tokens, shape.kv_heads, shape.head_dim)
        self.data = _host_tensor(sizes, dtype) if device == "cpu" else torch.zeros(sizes, dtype=dtype, device=device)
        self._free = list(range(pages))  # a heap: low pages first, so that a request's pages often lie together
        self._owned: set[int] = set()
        self._quarantined: set[int] = set()

    def layout(self, model: str) -> KVLayout:
        """The pool as peers see it. `model` is the fingerprint that both sides of a room must share."""
        itemsize = self.data.element_size()
        regions = array_regions(
            self.data.data_ptr(),
            self.data.shape,
            [stride * itemsize for stride in self.data.stride()],
            "LCPTHD",
            itemsize=itemsize,
            layers=range(self.data.shape[0]),
            device=str(self.data.device),
        )
        return KVLayout(regions, dtype=str(self.data.dtype).removeprefix("torch."), model=model)

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def check_fits(self, tokens: int) -> None:
        """Raise `InvalidRequest` when `tokens` tokens would not fit into the whole pool."""
        if self.pages_for(tokens) > self.pages:
            raise InvalidRequest(
                f"the request needs {self.pages_for(tokens)} pages for {tokens} tokens and the pool has {self.pages} "
                f"(of {self.page_tokens} tokens): shorten it, or start the worker with a larger pool"
            )

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Own `count` pages, or None and nothing when not so many are free now."""
        if count > len(self._free):
            return None
        taken = tuple(heapq.heappop(self._free) for _ in range(count))
        self._owned.update(taken)
        return taken

    def release(self, pages: Iterable[int]) -> None:
        """Free pages that are owned or quarantined; each of them, or `KVRoomError` and none."""
        leaving = set(pages)
        if not leaving <= self._owned | self._quarantined:
            raise KVRoomError(f"pages {sorted(leaving - self._owned - self._quarantined)} are free already")
        self._owned -= leaving
        self._quarantined -= leaving
        for page in leaving:
            heapq.heappush(self._free, page)

    def quarantine(self, pages: Sequence[int]) -> None:
        """Put owned pages aside until `release`."""
        moving = set(pages)
        if not moving <= self._owned:
            raise KVRoomError(f"pages {sorted(moving - self._owned)} are not owned")
        self._owned -= moving
        self._quarantined |= moving

    def counts(self) -> PoolCounts:
        """How many pages each holder has."""
        return PoolCounts(self.pages, len(self._free), len(self._owned), len(self._quarantined))

    def check(self) -> None:
        """Raise `KVRoomError` unless each page is either free or owned or quarantined, once."""
        if sorted([*self._free, *self._owned, *self._quarantined]) != list(range(self.pages)):
            raise KVRoomError(f"pages were lost or counted twice: {self.counts()}")

    def check_idle(self) -> None:
        """Raise `KVRoomError` unless every page is free, each of them once."""
        self.check()
        if len(self._free) < self.pages:
            raise KVRoomError(f"the pool is not whole: {self.counts()}")


class Lease:
    """The pages of one request. They return to the pool when neither the engine nor a room holds them any more."""

    def __init__(self, pool: PagedPool) -> None:
        self.pages: tuple[int, ...] = ()
        self._pool = pool
        self._lent = False
        self._dropped = False

    def take(self, count: int) -> bool:
        """Own `count` pages, once; False and nothing when not so many are free now."""
        pages = self._pool.allocate(count)
        self.pages = pages or ()
        return pages is not None

    def lend(self) -> None:
        """A room was opened that may be told of the pages. From now on it holds them, until it gives them back."""
        self._lent = True

    def give_back(self) -> None:
        """The room will never touch them again."""
        if self._lent and self._dropped:
            self._pool.release(self.pages)
        self._lent = False

    def drop(self) -> None:
        """The engine has no more use for them. Idempotent."""
        if self._dropped:
            return
        self._dropped = True
        if self._lent:
            self._pool.quarantine(self.pages)
        else:
            self._pool.release(self.pages)


def _host_tensor(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed memory on huge pages where the system gives them: transports then move several times more per second."""
    count = torch.Size(sizes).numel()
    memory = torch.frombuffer(allocate(count * dtype.itemsize).buffer, dtype=dtype, count=count)
    # The system hands a page out when it is first written; better now than in the middle of the first hand-offs.
    return memory.zero_().view(*sizes)

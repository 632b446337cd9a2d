"""The pool: the memory of everything that a model keeps of requests, and the books of who holds what.

Layers that keep every token share one page table, the main one. Layers with a sliding window have a page table of
their own, group "swa": a request needs only as many of its pages as its window and its longest chunk reach over, and
uses them in turn. States are group "state": one slot for each request.
"""

from __future__ import annotations

import torch

from kvroom import KVGroup, KVLayout, KVRegion, array_regions
from kvroom.errors import ConfigurationError, InvalidRequest

from .memory import free_bytes, zeroed
from .pages import PageBook, PoolCounts
from .shape import CacheShape, KVShape
from .states import StateSlots, slot_bytes

SLIDING = "swa"
STATE = "state"


class KVPages:
    """Keys and values of the layers of one group: `data` is [layers, 2, pages, page_tokens, kv_heads, head_dim].

    With a `window` a request keeps the last `window` tokens of it only; 0: every token.
    """

    def __init__(
        self,
        name: str,
        shape: KVShape,
        *,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: str,
        window: int = 0,
    ) -> None:
        self.name = name
        self.page_tokens = page_tokens
        self.window = window
        self.layers = shape.layers
        self.data = zeroed((len(shape.layers), 2, pages, page_tokens, shape.kv_heads, shape.head_dim), dtype, device)
        self.book = PageBook(pages)
        self._index = {layer: index for index, layer in enumerate(shape.layers)}

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of one of the model's layers, [pages, page_tokens, kv_heads, head_dim] each."""
        keys, values = self.data[self._index[layer]].unbind()
        return keys, values

    def regions(self) -> tuple[KVRegion, ...]:
        """The tensor as peers see it."""
        itemsize = self.data.element_size()
        return array_regions(
            self.data.data_ptr(),
            self.data.shape,
            [stride * itemsize for stride in self.data.stride()],
            "LCPTHD",
            itemsize=itemsize,
            layers=self.layers,
            device=str(self.data.device),
            group=self.name,
        )


class PagedPool:
    """`pages` pages for every token, and what `slots` requests need besides, if the model keeps more than that.

    `chunk_tokens` is the longest chunk of one request that is computed at once.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: str = "cpu",
        slots: int = 1,
        chunk_tokens: int = 1,
    ) -> None:
        if pages < 1 or page_tokens < 1:
            raise ConfigurationError(f"a pool of {pages} pages of {page_tokens} tokens: both must be positive")
        self.pages = pages
        self.page_tokens = page_tokens
        self._ring_pages = self.pages_for(shape.window - 1 + chunk_tokens) + 1
        self._check_memory(shape, slots, dtype, device)
        self.main = KVPages("", shape.full, pages=pages, page_tokens=page_tokens, dtype=dtype, device=device)
        self.sliding = shape.sliding and KVPages(
            SLIDING,
            shape.sliding,
            pages=min(pages, slots * self._ring_pages),
            page_tokens=page_tokens,
            dtype=dtype,
            device=device,
            window=shape.window,
        )
        self.states = StateSlots(shape.states, slots=slots, device=device) if shape.states else None
        self._group_of = {layer: group for group in (self.main, self.sliding) if group for layer in group.layers}
        self._dtype = str(dtype).removeprefix("torch.")

    def _check_memory(self, shape: CacheShape, slots: int, dtype: torch.dtype, device: str) -> None:
        """Raise `ConfigurationError` unless the memory is there, and name how many pages would fit."""

        itemsize = int(dtype.itemsize)

        def page_bytes(kept: KVShape) -> int:
            return len(kept.layers) * 2 * self.page_tokens * kept.kv_heads * kept.head_dim * itemsize

        ring = min(self.pages, slots * self._ring_pages) * page_bytes(shape.sliding) if shape.sliding else 0
        others, each = ring + slots * slot_bytes(shape.states), page_bytes(shape.full)
        nbytes, free = others + self.pages * each, free_bytes(device)
        if nbytes <= free:
            return
        besides = f", {others} of them for windows and states of {slots} requests" if others else ""
        if fit := max(free - others, 0) // each if each else 0:
            remedy = f"at most {fit} pages fit (--pages)"
        elif each > free:
            remedy = "not even one page fits: take fewer tokens in a page (--page-tokens)"
        else:
            remedy = "take fewer requests at once (--max-running), or shorter chunks (--chunk-tokens)"
        raise ConfigurationError(
            f"a pool of {self.pages} pages of {self.page_tokens} tokens takes {nbytes} bytes{besides}, and "
            f"{free} bytes are free on {device}: {remedy}"
        )

    @property
    def data(self) -> torch.Tensor:
        """Keys and values of the layers that keep every token."""
        return self.main.data

    @property
    def book(self) -> PageBook:
        """Who holds which page of the main page table."""
        return self.main.book

    @property
    def books(self) -> dict[str, PageBook]:
        """The book of each group; "" is the main one."""
        every = (("", self.main), (SLIDING, self.sliding), (STATE, self.states))
        return {name: group.book for name, group in every if group is not None}

    def keeps(self, layer: int) -> KVPages:
        """The group that keeps the keys and values of one of the model's layers."""
        return self._group_of[layer]

    def layout(self, model: str) -> KVLayout:
        """The pool as peers see it. `model` is the fingerprint that both sides of a room must share."""
        regions, groups = self.main.regions(), list[KVGroup]()
        if self.sliding is not None:
            regions += self.sliding.regions()
            groups.append(KVGroup(name=SLIDING, window=self.sliding.window))
        if self.states is not None:
            regions += self.states.regions(STATE)
            groups.append(KVGroup(name=STATE, window=1))
        return KVLayout(regions, dtype=self._dtype, model=model, groups=tuple(groups))

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_tokens)

    def needs(self, tokens: int) -> dict[str, int]:
        """Pages of each group that a request of `tokens` tokens takes."""
        pages = self.pages_for(tokens)
        return {name: {SLIDING: min(pages, self._ring_pages), STATE: 1}.get(name, pages) for name in self.books}

    def check_fits(self, tokens: int) -> None:
        """Raise `InvalidRequest` when `tokens` tokens would not fit into the whole pool."""
        if self.pages_for(tokens) > self.pages:
            raise InvalidRequest(
                f"the request needs {self.pages_for(tokens)} pages for {tokens} tokens and the pool has {self.pages} "
                f"(of {self.page_tokens} tokens): shorten it, or start the worker with a larger pool"
            )

    def whole(self) -> bool:
        """Whether nobody holds a page of any group."""
        return all(book.counts().whole for book in self.books.values())

    def check(self) -> None:
        """Raise `KVRoomError` unless each page of each group has one holder."""
        for book in self.books.values():
            book.check()

    def check_idle(self) -> None:
        """Raise `KVRoomError` unless every page of every group is free or cached, each of them once."""
        for book in self.books.values():
            book.check_idle()

    def summary(self) -> str:
        """Who holds how much of every group, for messages."""
        return ", ".join(f"{name} {book.counts()}".strip() for name, book in self.books.items())

    def others(self) -> dict[str, PoolCounts]:
        """The counts of every group but the main one."""
        return {name: book.counts() for name, book in self.books.items() if name}

"""The pool: the memory of everything that a model keeps of requests, with a book of holders for each page table.

Layers that keep every token share the main page table. Layers with a sliding window share a second one, group "swa".
A request needs only as many pages of it as its window and its longest chunk span, and uses them in rotation. States
are group "state", with one slot per request.
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

    With a `window`, a request keeps only its last `window` tokens; 0 means every token.
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
        """Return the keys and the values of one model layer, each [pages, page_tokens, kv_heads, head_dim]."""
        keys, values = self.data[self._index[layer]].unbind()
        return keys, values

    def regions(self) -> tuple[KVRegion, ...]:
        """Return the description of the tensor's memory for the layout that peers receive."""
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
    """A main page table of `pages` pages, and windows and states for `slots` requests if the model has them.

    `chunk_tokens` is the longest chunk of one request in one forward call. Raises `ConfigurationError` if a size is
    invalid or the memory does not suffice.
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
            raise ConfigurationError(f"invalid pool: {pages} pages of {page_tokens} tokens; both must be positive")
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
        """Raise `ConfigurationError`, with the number of pages that would fit, if the pool does not fit into memory."""

        itemsize = int(dtype.itemsize)

        def page_bytes(kept: KVShape) -> int:
            return len(kept.layers) * 2 * self.page_tokens * kept.kv_heads * kept.head_dim * itemsize

        ring = min(self.pages, slots * self._ring_pages) * page_bytes(shape.sliding) if shape.sliding else 0
        others, each = ring + slots * slot_bytes(shape.states), page_bytes(shape.full)
        nbytes, free = others + self.pages * each, free_bytes(device)
        if nbytes <= free:
            return
        share = f", {others} of them for windows and states of {slots} requests" if others else ""
        if fit := max(free - others, 0) // each if each else 0:
            remedy = f"at most {fit} pages fit (--pages)"
        elif each > free:
            remedy = "not even one page fits: use smaller pages (--page-tokens)"
        else:
            remedy = "allow fewer running requests (--max-running), or use shorter chunks (--chunk-tokens)"
        raise ConfigurationError(
            f"a pool of {self.pages} pages of {self.page_tokens} tokens takes {nbytes} bytes{share}, and "
            f"{free} bytes are free on {device}: {remedy}"
        )

    @property
    def data(self) -> torch.Tensor:
        """The tensor of keys and values of the layers that keep every token."""
        return self.main.data

    @property
    def book(self) -> PageBook:
        """The book of the main page table."""
        return self.main.book

    @property
    def books(self) -> dict[str, PageBook]:
        """The book of each group by its name; "" is the main page table."""
        every = (("", self.main), (SLIDING, self.sliding), (STATE, self.states))
        return {name: group.book for name, group in every if group is not None}

    def group_of(self, layer: int) -> KVPages:
        """Return the group that keeps the keys and values of a model layer."""
        return self._group_of[layer]

    def layout(self, model: str) -> KVLayout:
        """Return the layout that peers receive. `model` is the fingerprint, which must be equal on both sides."""
        regions, groups = self.main.regions(), list[KVGroup]()
        if self.sliding is not None:
            regions += self.sliding.regions()
            groups.append(KVGroup(name=SLIDING, window=self.sliding.window))
        if self.states is not None:
            regions += self.states.regions(STATE)
            groups.append(KVGroup(name=STATE, window=1))
        return KVLayout(regions, dtype=self._dtype, model=model, groups=tuple(groups))

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that `tokens` tokens need, the last one possibly not full."""
        return -(-tokens // self.page_tokens)

    def needs(self, tokens: int) -> dict[str, int]:
        """Return the number of pages of each group that a request of `tokens` tokens needs."""
        pages = self.pages_for(tokens)
        return {name: {SLIDING: min(pages, self._ring_pages), STATE: 1}.get(name, pages) for name in self.books}

    def check_fits(self, tokens: int) -> None:
        """Raise `InvalidRequest` if `tokens` tokens would not fit even into an empty pool."""
        if self.pages_for(tokens) > self.pages:
            raise InvalidRequest(
                f"the request needs {self.pages_for(tokens)} pages for {tokens} tokens and the pool has {self.pages} "
                f"(of {self.page_tokens} tokens): shorten it, or start the worker with a larger pool"
            )

    def whole(self) -> bool:
        """Return True if no lease and no room holds a page of any group."""
        return all(book.counts().whole for book in self.books.values())

    def check(self) -> None:
        """Raise `KVRoomError` unless each page of each group has exactly one holder."""
        for book in self.books.values():
            book.check()

    def check_idle(self) -> None:
        """Raise `KVRoomError` unless every page of every group is either free or cached."""
        for book in self.books.values():
            book.check_idle()

    def summary(self) -> str:
        """Return the page counts of every group as one line for messages."""
        return ", ".join(f"{name} {book.counts()}".strip() for name, book in self.books.items())

    def others(self) -> dict[str, PoolCounts]:
        """Return the page counts of every group except the main one."""
        return {name: book.counts() for name, book in self.books.items() if name}

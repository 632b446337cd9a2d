"""The checksum of a room: XXH3 (64 bits, seed 0) over exactly the bytes handed over, in the order of `plan.hash_order`.

Both sides compute it from their own pages, so it covers every step between them. Only host memory can be read; check
`unreadable` before a room asks for a checksum.

XXH3: Yann Collet, https://github.com/Cyan4973/xxHash, through the package `xxhash`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvroom.plan import KVLayout, PageTable, Strip

from .page_lists import HeldPages

_GATHER_BYTES = 4 << 20
"""Bytes that are copied into one array before they are hashed: few calls, and little memory."""
Rows = npt.NDArray[np.uint8]


def unreadable(layout: KVLayout) -> str | None:
    """Return the reason why this layout's memory cannot be hashed; None if it can."""
    device = next((region.device for region in layout.regions if region.device != "cpu"), None)
    if device is None:
        return None
    return f"checksums need pages in host memory, got pages on {device}: hand over without a checksum"


def checksum(strips: Iterable[Strip], held: Mapping[str, Sequence[HeldPages]], ours: KVLayout, theirs: KVLayout) -> int:
    """Return the XXH3 of the tokens in this side's `held` pages of each group that both layouts hold.

    Call it in a worker thread: it reads all bytes, and releases the GIL while it hashes. The pages must not change
    until it returns.
    """
    digest = xxhash.xxh3_64()
    for strip in strips:
        mine, other = ours.table(strip.group), theirs.table(strip.group)
        split = mine.split is not None or other.split is not None
        for one in held.get(strip.group, ()):
            rows = _common_rows(strip, one, mine, other) if split else _rows(strip, one)
            for part in rows:
                digest.update(np.ascontiguousarray(part).data)
    return digest.intdigest()


def _rows(strip: Strip, held: HeldPages) -> Iterator[Rows]:
    """Yield every element of these tokens, `_GATHER_BYTES` at a time."""
    view, per_page = _view(strip), strip.page_tokens // strip.span
    numbers = np.asarray(held.pages, np.intp)
    step = max(1, _GATHER_BYTES // (per_page * strip.heads * strip.head_bytes))
    first = held.start // strip.page_tokens
    start, stop = held.start // strip.span, -(-held.stop // strip.span)
    for low in range(0, len(numbers), step):
        gathered = view[numbers[low : low + step]].reshape(-1, strip.heads * strip.head_bytes)
        begin = (first + low) * per_page  # the element of the request in the first row
        yield gathered[max(0, start - begin) : stop - begin]


def _common_rows(strip: Strip, held: HeldPages, mine: PageTable, other: PageTable) -> Iterator[Rows]:
    """Yield the elements of the tokens that both sides hold, for layouts that split tokens between ranks."""
    view, numbers = _view(strip), np.asarray(held.pages, np.intp)
    first = mine.place(held.start) // strip.page_tokens
    step = max(1, _GATHER_BYTES // (strip.heads * strip.head_bytes)) * strip.span
    for low in range(held.start, held.stop, step):
        tokens = np.arange(low, min(low + step, held.stop), strip.span)
        places = mine.places(tokens[mine.holds(tokens) & other.holds(tokens)])
        page, slot = np.divmod(places, strip.page_tokens)
        yield view[numbers[page - first], slot // strip.span]


def _view(strip: Strip) -> Rows:
    """Return the strip's memory, without a copy, as [pages, elements of a page, heads, head_bytes]."""
    shape = (strip.pages, strip.page_tokens // strip.span, strip.heads, strip.head_bytes)
    strides = (strip.page_stride, strip.token_stride, strip.head_stride, 1)
    extent = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    memory = np.frombuffer(memoryview((ctypes.c_ubyte * extent).from_address(strip.base)), np.uint8)
    return np.lib.stride_tricks.as_strided(memory, shape, strides)

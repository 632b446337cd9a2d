"""The checksum of a room: XXH3 (64 bits, seed 0) over exactly the bytes handed over, in the order of `plan.strips`.

Both sides compute it from their own pages, so whatever went wrong in between shows. Only memory of the host can be
read; `unreadable` says so before a room depends on it.

XXH3: Yann Collet, https://github.com/Cyan4973/xxHash, through the package `xxhash`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from kvroom.core.inputs import SendPages
from kvroom.plan import KVLayout, Strip

_GATHER_BYTES = 4 << 20  # so many are copied side by side before they are hashed


def unreadable(layout: KVLayout) -> str | None:
    """Why no checksum can be taken over this layout's memory; None if one can."""
    device = next((region.device for region in layout.regions if region.device != "cpu"), None)
    if device is None:
        return None
    return f"checksums are computed in host memory, and these pages are on {device}: hand over without a checksum"


def checksum(strips: Iterable[Strip], pages: Sequence[int], start: int, stop: int) -> int:
    """XXH3 over tokens [start, stop), which these pages of our memory hold; `pages[0]` holds token `start`.

    Takes time and lets other threads run; call it in a worker thread. The pages must not change meanwhile.
    """
    digest = xxhash.xxh3_64()
    numbers = np.asarray(pages, np.intp)
    for strip in strips:
        view = _view(strip)
        page_bytes = strip.page_tokens * strip.heads * strip.head_bytes
        step = max(1, _GATHER_BYTES // page_bytes)
        first = start // strip.page_tokens
        for low in range(0, len(numbers), step):
            gathered = view[numbers[low : low + step]].reshape(-1, strip.heads * strip.head_bytes)
            begin = (first + low) * strip.page_tokens  # the token of the request in the first row
            digest.update(gathered[max(0, start - begin) : stop - begin].data)
    return digest.intdigest()


def whole_window(chunks: Sequence[SendPages], page_tokens: int, start: int, stop: int) -> tuple[int, ...]:
    """The source's pages for tokens [start, stop): a page that two chunks share was given with both."""
    if start == stop:
        return ()
    found: dict[int, int] = {}
    begin = 0
    for chunk in chunks:
        found.update(enumerate(chunk.pages, begin // page_tokens))
        begin = chunk.stop
    return tuple(found[index] for index in range(start // page_tokens, -(-stop // page_tokens)))


def _view(strip: Strip) -> npt.NDArray[np.uint8]:
    """The strip's memory as [pages, page_tokens, heads, head_bytes]."""
    shape = (strip.pages, strip.page_tokens, strip.heads, strip.head_bytes)
    strides = (strip.page_stride, strip.token_stride, strip.head_stride, 1)
    extent = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    memory = np.frombuffer(memoryview((ctypes.c_ubyte * extent).from_address(strip.base)), np.uint8)
    return np.lib.stride_tricks.as_strided(memory, shape, strides)

"""A KV pool in plain memory whose bytes a test can fill, read and compare."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvroom.plan import KVLayout, array_regions
from kvroom.transports.kit.pool import allocate


class TestPool:
    """A pool of `layers` x (k, v) x `pages` x `page_tokens` x `heads` elements of `head_bytes`, zeroed.

    Close it after use. With `shared`, its memory is of a kind that `local` can map into another process.
    """

    __test__ = False  # not a test class, for pytest

    def __init__(
        self,
        *,
        layers: int = 2,
        pages: int = 16,
        page_tokens: int = 4,
        heads: int = 2,
        head_bytes: int = 16,
        shared: bool = False,
    ) -> None:
        self.shape = (layers, 2, pages, page_tokens, heads, head_bytes)
        self.memory = allocate(int(np.prod(self.shape)), shared=shared)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.memory.buffer, np.uint8).reshape(self.shape)
        regions = array_regions(
            self.memory.address, self.shape, self.array.strides, "LCPTHD", itemsize=1, layers=range(layers)
        )
        self.layout = KVLayout(regions, dtype="uint8")

    def fill(self, seed: int) -> None:
        """Fill the pool with random bytes; the same seed gives the same bytes."""
        self.array[:] = np.random.default_rng(seed).integers(0, 256, self.shape, np.uint8)

    def tokens(self, pages: Iterable[int], count: int) -> npt.NDArray[np.uint8]:
        """Return the first `count` tokens in these pages: uint8[layers, 2, count, heads, head_bytes]."""
        chosen = self.array[:, :, list(pages)]
        layers, two, n, page_tokens, *rest = chosen.shape
        return chosen.reshape(layers, two, n * page_tokens, *rest)[:, :, :count]

    def close(self) -> None:
        """Free the memory. The array must not be used after that."""
        del self.array
        self.memory.close()

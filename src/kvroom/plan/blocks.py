"""Blocks: the form in which a plan hands copies to a transport."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]


class Blocks(NamedTuple):
    """Copies: `length[i]` bytes go from address `src[i]` to address `dst[i]`; three arrays uint64[n], host byte order.

    Addresses are virtual addresses of the process (or device) that owns each side. No two blocks overlap in `dst`.
    """

    src: U64
    dst: U64
    length: U64

    @property
    def nbytes(self) -> int:
        """Return the total number of bytes to move."""
        return int(self.length.sum())


class Extents(NamedTuple):
    """Byte ranges [address[i], address[i] + length[i]) of one side's memory, sorted, disjoint, not adjacent."""

    address: U64
    length: U64


class MemoryRange(NamedTuple):
    """One piece of memory to register: virtual address, size in bytes, device ("cpu", "cuda:0", ...)."""

    address: int
    nbytes: int
    device: str = "cpu"

"""Settings of glibc's allocator for processes whose resident memory is measured."""

from __future__ import annotations

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 10),
    "MALLOC_TOP_PAD_": "0",
}
"""An environment in which resident memory shows what a process keeps, and not what glibc keeps for it.

By default glibc keeps freed memory for each thread that has allocated, and a small live block at the top of its heap
prevents it from returning everything freed below: over 120,000 malformed connections a worker's live heap grew by
0.2 MiB and the free memory in the heap by 9 MiB. With these settings there is one heap, larger blocks are mapped and
unmapped one by one, and the heap shrinks as soon as its top is free.
"""

"""Memory for pools: zeroed, registered with transports later, on the host or on a device."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from kvroom.transports import allocate

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_bytes(device: str) -> int:
    """Return how much more memory a process can take there. The system hands more out, and kills who uses it."""
    if device != "cpu":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = sum(int(fields[1]) << 10 for fields in lines if fields[0] in ("MemAvailable:", "SwapFree:"))
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit))


def zeroed(sizes: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of zeros.

    On the host it lies on huge pages where the system gives them: transports then move several times more per second.
    """
    if device != "cpu":
        return torch.zeros(tuple(sizes), dtype=dtype, device=device)
    count = prod(sizes)  # torch's own count overflows
    memory = torch.frombuffer(allocate(count * dtype.itemsize).buffer, dtype=dtype, count=count)
    # The system hands a page out when it is first written; better now than in the middle of the first hand-offs.
    return memory.zero_().view(*sizes)

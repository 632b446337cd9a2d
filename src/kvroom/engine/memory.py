"""Zeroed memory for pools, on the host or on a device. The manager registers it with the transport later."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from kvroom.transports import allocate

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_bytes(device: str) -> int:
    """Return the bytes that this process can still use on `device`.

    An allocation alone is no test: Linux grants more memory than it has, and kills the process that then writes to it.
    """
    if device != "cpu":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = sum(int(fields[1]) << 10 for fields in lines if fields[0] in ("MemAvailable:", "SwapFree:"))
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit))


def zeroed(sizes: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a tensor of zeros. On the host it uses huge pages where available: transports are several times faster."""
    if device != "cpu":
        return torch.zeros(tuple(sizes), dtype=dtype, device=device)
    count = prod(sizes)  # a Python int; torch's own product overflows
    memory = torch.frombuffer(allocate(count * dtype.itemsize).buffer, dtype=dtype, count=count)
    # The system allocates each page at the first write. Do that now, and not in the middle of the first hand-offs.
    return memory.zero_().view(*sizes)

"""Memory for pools: zeroed, registered with transports later, on the host or on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvroom.transports.pool import allocate


def zeroed(sizes: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of zeros.

    On the host it lies on huge pages where the system gives them: transports then move several times more per second.
    """
    if device != "cpu":
        return torch.zeros(tuple(sizes), dtype=dtype, device=device)
    count = torch.Size(sizes).numel()
    memory = torch.frombuffer(allocate(count * dtype.itemsize).buffer, dtype=dtype, count=count)
    # The system hands a page out when it is first written; better now than in the middle of the first hand-offs.
    return memory.zero_().view(*sizes)

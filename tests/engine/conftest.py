"""Use one thread for torch: the matrices are tiny, and spinning threads cost tenfold on a busy machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

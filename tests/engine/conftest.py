"""One thread for torch: the matrices are tiny, and threads that spin for each other on a busy machine cost tenfold."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

"""One forward call over many sequences: chunks of any lengths, flattened into one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvroom.engine.attention import Chunk, PagedBatch
from kvroom.engine.pool import PagedPool
from kvroom.engine.weights import LoadedModel


def forward(model: LoadedModel, pool: PagedPool, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Compute `chunks`, their keys and values into their pages; the logits after each chunk's last token.

    Returns float32 [len(chunks), vocab] on the CPU. Afterwards the pages hold all positions up to each chunk's end.
    """
    tokens = torch.tensor([[token for chunk in chunks for token in chunk.tokens]], device=model.device)
    positions = torch.cat([torch.arange(chunk.start, chunk.start + len(chunk.tokens)) for chunk in chunks])
    last = torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0) - 1
    with torch.inference_mode():
        output = model.model(
            input_ids=tokens,
            position_ids=positions.unsqueeze(0).to(model.device),
            use_cache=False,
            logits_to_keep=last.to(model.device),
            paged=PagedBatch(pool.data, chunks),
        )
        logits: torch.Tensor = output.logits[0].float().cpu()
    return logits

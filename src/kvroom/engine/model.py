"""One forward call over many sequences: chunks of any lengths, flattened into one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention import Chunk, PagedBatch
from .pool import PagedPool
from .shape import cache_parameter
from .states import RequestStates
from .weights import LoadedModel


def forward(model: LoadedModel, pool: PagedPool, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Compute `chunks`, what they leave into their pages and slots; the logits after each chunk's last token.

    Returns float32 [len(chunks), vocab] on the CPU. Afterwards the pages hold all positions up to each chunk's end.
    A model with states is called once for each chunk: its convolutions would run from one sequence into the next.
    Raises `KVRoomError`, and computes nothing, if that would write into a page that the prefix cache shares.
    """
    for chunk in chunks:
        pool.book.check_writable(chunk.pages[chunk.start // pool.page_tokens : pool.pages_for(chunk.stop)])
    if pool.states is None:
        return _call(model, PagedBatch(pool, chunks), chunks)
    states = [pool.states.of(chunk.slot, fresh=chunk.start == 0) for chunk in chunks]
    return torch.cat(
        [
            _call(model, PagedBatch(pool, [chunk]), [chunk], **{cache_parameter(model.model): one})
            for chunk, one in zip(chunks, states, strict=True)
        ]
    )


def _call(model: LoadedModel, batch: PagedBatch, chunks: Sequence[Chunk], **cache: RequestStates) -> torch.Tensor:
    tokens = torch.tensor([[token for chunk in chunks for token in chunk.tokens]], device=model.device)
    positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    last = torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0) - 1
    with torch.inference_mode():
        output = model.model(
            input_ids=tokens,
            position_ids=positions.unsqueeze(0).to(model.device),
            use_cache=False,
            logits_to_keep=last.to(model.device),
            paged=batch,
            **cache,
        )
        logits: torch.Tensor = output.logits[0].float().cpu()
    return logits

"""One forward call over many sequences: chunks of any length, flattened into one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention import Chunk, PagedBatch
from .pool import PagedPool
from .shape import cache_parameter
from .states import RequestStates
from .weights import LoadedModel


def forward(model: LoadedModel, pool: PagedPool, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Run `chunks` through the model, write their keys, values and states, and return the logits of their last tokens.

    A model with states is called once per chunk, because its convolutions would run from one sequence into the next.

    Returns:
        Logits, float32 [len(chunks), vocab] on the CPU. The pages then hold all positions up to each chunk's end.

    Raises:
        KVRoomError: A chunk would write into a page that the prefix cache shares. Nothing was computed or written.
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

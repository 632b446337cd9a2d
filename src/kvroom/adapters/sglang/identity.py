"""The identity of a request of SGLang: what its two legs must have in common."""

from __future__ import annotations

from typing import Any

from kvroom import KVIdentity


def request_identity(request: Any, queue: Any) -> KVIdentity:
    """Return what decides the KV cache of a request in one and the same model.

    Args:
        request: SGLang's `Req`: its token ids, in which SGLang has replaced those of images by their hashes, its cache
            salt, and its LoRA adapter.
        queue: the queue of the scheduler that has the request; it is asked for the adapter's name.
    """
    adapter: str | None = ""
    if (lora_id := getattr(request, "lora_id", None)) is not None:
        # Each server makes up an id of its own for an adapter, so its name is compared. An adapter that the scheduler
        # does not know is not stated.
        runner = getattr(getattr(queue.scheduler, "tp_worker", None), "model_runner", None)
        adapters = getattr(getattr(runner, "lora_manager", None), "lora_refs", {})
        name = getattr(adapters.get(lora_id), "lora_name", None)
        adapter = None if name is None else str(name)
    return KVIdentity.of(request.origin_input_ids, adapter=adapter, cache_salt=request.cache_salt or "")

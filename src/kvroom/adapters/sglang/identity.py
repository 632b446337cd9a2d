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
    lora_id = getattr(request, "lora_id", None)
    adapter = "" if lora_id is None else _adapter_name(lora_id, queue)
    return KVIdentity.of(request.origin_input_ids, adapter=adapter, cache_salt=request.cache_salt or "")


def _adapter_name(lora_id: str, queue: Any) -> str | None:
    """Return the name of an adapter, or None if the scheduler does not know it; then it is not stated.

    Each server makes up an id of its own for an adapter, so ids cannot be compared.
    """
    runner = getattr(getattr(queue.scheduler, "tp_worker", None), "model_runner", None)
    adapters = getattr(getattr(runner, "lora_manager", None), "lora_refs", {})
    name = getattr(adapters.get(lora_id), "lora_name", None)
    return None if name is None else str(name)

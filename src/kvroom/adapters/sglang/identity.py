"""The identity of a request of SGLang, which must be the same in both of its legs."""

from __future__ import annotations

from typing import Any

from kvroom import KVIdentity


def request_identity(request: Any, queue: Any) -> KVIdentity:
    """Return the properties of a request that determine its KV cache, for a given model.

    Args:
        request: SGLang's `Req`: its token ids, in which SGLang has replaced those of images by their hashes, its cache
            salt, and its LoRA adapter.
        queue: The scheduler's queue that holds the request, from which the name of the adapter is read.
    """
    adapter: str | None = ""
    if (lora_id := getattr(request, "lora_id", None)) is not None:
        # Each server generates its own id for an adapter, so names are compared. The name of an adapter that the
        # scheduler does not know is left out.
        runner = getattr(getattr(queue.scheduler, "tp_worker", None), "model_runner", None)
        adapters = getattr(getattr(runner, "lora_manager", None), "lora_refs", {})
        name = getattr(adapters.get(lora_id), "lora_name", None)
        adapter = None if name is None else str(name)
    return KVIdentity.of(request.origin_input_ids, adapter=adapter, cache_salt=request.cache_salt or "")

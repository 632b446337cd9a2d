"""The identity of an SGLang request, which its two legs must have in common."""

from __future__ import annotations

from typing import Any

from kvroom import KVIdentity


def request_identity(request: Any, queue: Any) -> KVIdentity:
    """Return the identity of a request: everything besides the model that determines its KV cache.

    That is the token ids, the name of the LoRA adapter, and the cache salt. Images count, too, because SGLang replaces
    their token ids by hashes of their content.

    Args:
        request: SGLang's `Req`.
        queue: The scheduler's queue that holds the request, through which the adapter's name is found.
    """
    adapter: str | None = ""
    if (lora_id := getattr(request, "lora_id", None)) is not None:
        # Each server chooses its own id for an adapter, so only the name can be compared. If the name cannot be found,
        # the identity leaves the adapter out: None is never compared, and the request is not refused.
        runner = getattr(getattr(queue.scheduler, "tp_worker", None), "model_runner", None)
        adapters = getattr(getattr(runner, "lora_manager", None), "lora_refs", {})
        name = getattr(adapters.get(lora_id), "lora_name", None)
        adapter = None if name is None else str(name)
    return KVIdentity.of(request.origin_input_ids, adapter=adapter, cache_salt=request.cache_salt or "")

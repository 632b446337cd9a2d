"""Identity of a prompt, so that a decode side never continues the KV cache of another prompt.

The two legs of a request reach the two servers on their own ways. If a client or a router uses one room number for two
different prompts, their lengths may still be equal; their digests are not.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

DIGEST_BYTES = 16


def prompt_digest(request: Any) -> str:
    """Return a fingerprint of what decides the KV cache of `request`, SGLang's `Req`, in one and the same model.

    It covers the token ids, in which SGLang has replaced those of an image by its hash, and whether a LoRA adapter is
    used. Which adapter is not covered: a scheduler knows adapters by an id that its own server has made up.
    """
    tokens = np.asarray(request.origin_input_ids, dtype=np.int64)
    digest = blake2b(tokens.tobytes(), digest_size=DIGEST_BYTES)
    if getattr(request, "lora_id", None) is not None:
        digest.update(b"lora")
    return digest.hexdigest()

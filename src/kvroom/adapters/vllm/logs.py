"""kvroom's log records in vLLM's log. vLLM configures only loggers below `vllm`, so kvroom's take over its handlers."""

from __future__ import annotations

import logging


def use_vllm_handlers() -> None:
    """Give the logger `kvroom` the handlers and the level of the logger `vllm`. Idempotent."""
    kvroom, vllm = logging.getLogger("kvroom"), logging.getLogger("vllm")
    kvroom.setLevel(vllm.level)
    if vllm.handlers:
        kvroom.handlers = list(vllm.handlers)
        kvroom.propagate = False

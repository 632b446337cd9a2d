"""kvroom's records in vLLM's log. vLLM configures only the loggers below `vllm`, so its handlers are reused."""

from __future__ import annotations

import logging


def adopt() -> None:
    """Give kvroom's logger the handlers and the level of vLLM's logger. Idempotent."""
    ours, theirs = logging.getLogger("kvroom"), logging.getLogger("vllm")
    ours.setLevel(theirs.level)
    if theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False

"""kvroom's records in vLLM's log: vLLM configures loggers below `vllm` only, so ours are written by its handlers."""

from __future__ import annotations

import logging


def adopt() -> None:
    """Write kvroom's records where and from which level on vLLM writes its own. Idempotent."""
    ours, theirs = logging.getLogger("kvroom"), logging.getLogger("vllm")
    ours.setLevel(theirs.level)
    if theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False

"""Faults that an event loop reports, as log records that repeat once a second at most.

asyncio writes a traceback for each one, as often as it comes: a fault of ours that a peer can cause would let that peer
fill the disk.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .repeats import Repeats

logger = logging.getLogger(__name__)


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log each kind of fault that this loop meets once a second at most, with its traceback, and count the others."""
    log = Repeats(logger)

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # The loop's own text has the call and its arguments in it: no two of them are alike, so it makes no kind.
        error = context.get("exception")
        log.error(f"{type(error).__name__} in an event loop: %s", context.get("message"), exc_info=error)

    loop.set_exception_handler(report)

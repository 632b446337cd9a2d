"""Errors that an event loop reports, logged at most once a second for each kind.

asyncio logs a traceback for each one. A bug in this process that a peer can trigger would let that peer fill the disk.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .repeats import Repeats

logger = logging.getLogger(__name__)


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log each kind of error in this loop at most once a second, with its traceback, and count the others."""
    log = Repeats(logger)

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # The loop's own text contains the call and its arguments, so it differs each time and cannot identify a kind.
        error = context.get("exception")
        log.error(f"{type(error).__name__} in an event loop: %s", context.get("message"), exc_info=error)

    loop.set_exception_handler(report)

"""Turn Ctrl-C and SIGTERM into the cancellation of one task, so that every `finally` and `async with` block runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from kvroom.http import log_loop_errors

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_until_interrupted(work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work` on a new event loop and return its result, or None if a signal ended it.

    A second signal cancels the task again: it interrupts the cleanup that the first one started.
    """

    async def run() -> T | None:
        loop = asyncio.get_running_loop()
        log_loop_errors(loop)
        task = loop.create_task(work)
        for number in _SIGNALS:
            loop.add_signal_handler(number, task.cancel)
        try:
            await asyncio.wait([task])
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return None if task.cancelled() else task.result()

    return asyncio.run(run())

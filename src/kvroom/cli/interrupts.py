"""Ctrl-C and SIGTERM as the cancellation of one task, so that every block on the way out cleans up after itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from kvroom.http import log_loop_errors

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_until_interrupted(work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work` on an event loop of its own; None if a signal ended it. A second signal hurries the cleaning up."""

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

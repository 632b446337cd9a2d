"""`asyncio.wait_for` without its lost cancellations. Delete this module with Python 3.11.

`asyncio.wait_for` of Python 3.10 and 3.11 loses a cancellation that arrives in the loop turn in which the work ends
(https://github.com/python/cpython/issues/86296). A task that retries in a loop would then continue, and the `close`
that cancelled it would wait until the task ends by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], limit_s: float) -> T:
    """Return or raise the result of `work`; raise `asyncio.TimeoutError` after `limit_s` seconds.

    After any exception, cancellation included, the work has ended: by itself, or because it was cancelled here.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=limit_s)
    except asyncio.CancelledError:
        await _end(task)
        raise
    if task.done():
        return task.result()
    await _end(task)
    raise asyncio.TimeoutError


async def _end(task: asyncio.Future[T]) -> None:
    """Cancel the work and wait for its end.

    Not called in a `finally`: a coroutine that is discarded together with its loop must not wait.
    """
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as retrieved, or asyncio would log it

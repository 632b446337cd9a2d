"""Several sequences of one call at once: they end together, whoever fails or goes away first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from kvroom.errors import KVRoomError

T = TypeVar("T")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order, or raise the first failure, which the others are told. Nothing runs on afterwards.

    Each of `work` begins, even if the caller is cancelled at once: an engine that never saw a request could not tell
    the other side that it was cancelled. `asyncio.gather` passes a cancellation on before its tasks have begun.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        return [task.result() for task in sorted(tasks, key=lambda task: task not in done)]
    except KVRoomError as error:
        await _end(tasks, f"another sequence of the same call failed: {error}")
        raise
    finally:
        await _end(tasks)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What the streams yield, as it comes, with the stream's index. Raises the first failure.

    Closing or cancelling it closes all of them, and returns when each has cleaned up.
    """
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [one for one in waiting if one in done]:  # in the order of waiting: fair
                index = waiting[task]
                try:
                    item = task.result()
                except StopAsyncIteration:
                    del waiting[task]
                    continue
                yield index, item
                del waiting[task]
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
    finally:
        await _end(list(waiting))
        for stream in streams:
            await stream.aclose()


async def _end(tasks: Sequence[asyncio.Future[Any]], cause: str | None = None) -> None:
    for task in tasks:
        task.cancel(cause)
    await asyncio.gather(*tasks, return_exceptions=True)

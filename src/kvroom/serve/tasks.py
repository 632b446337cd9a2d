"""Concurrent sequences of one call. They end together when one of them fails or the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from kvroom.errors import KVRoomError

T = TypeVar("T")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order, or cancel the others and raise the first failure. Nothing runs afterwards.

    Each coroutine of `work` starts, even if the caller is cancelled immediately: an engine that never got a request
    could not tell the other side about the cancellation. `asyncio.gather` would cancel its tasks before they start.
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
    """Yield the items of all streams as they arrive, each with the index of its stream. Raises the first failure.

    Closing or cancelling the generator closes all streams, and completes when each of them has cleaned up.
    """
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [one for one in waiting if one in done]:  # longest waiting first, so that no stream starves
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

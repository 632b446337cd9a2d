"""Sequences of one call end together: none runs after the caller has its answer, an error or a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from kvroom.errors import RoomFailed
from kvroom.serve.tasks import merged, together


class Probe:
    """A stream or a task that records how it ended."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.ended = False

    async def wait(self) -> int:
        try:
            self.running.set()
            await asyncio.get_running_loop().create_future()
            return 0
        finally:
            self.ended = True

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield await self.wait()
        finally:
            self.ended = True


async def fail_after(event: asyncio.Event) -> int:
    await event.wait()
    raise ValueError("planted")


async def count(to: int) -> AsyncGenerator[int, None]:
    for number in range(to):
        yield number


def test_together_keeps_the_order() -> None:
    async def check() -> None:
        assert await together([asyncio.sleep(0, result) for result in (3, 1, 2)]) == [3, 1, 2]

    asyncio.run(check())


def test_together_tells_the_others_what_failed() -> None:
    told: list[object] = []

    async def listen(running: asyncio.Event) -> int:
        running.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError as cancelled:
            told.extend(cancelled.args)
            raise
        return 0

    async def fail(running: asyncio.Event) -> int:
        await running.wait()
        raise RoomFailed("planted")

    async def check() -> None:
        running = asyncio.Event()
        with pytest.raises(RoomFailed, match="planted"):
            await together([listen(running), fail(running)])

    asyncio.run(check())
    assert told == ["another sequence of the same call failed: planted"]


def test_together_ends_the_others_when_one_fails() -> None:
    async def check() -> None:
        probe = Probe()
        with pytest.raises(ValueError, match="planted"):
            await together([probe.wait(), fail_after(probe.running)])
        assert probe.ended

    asyncio.run(check())


def test_together_ends_all_when_cancelled() -> None:
    async def check() -> None:
        probes = [Probe(), Probe()]
        task = asyncio.ensure_future(together([probe.wait() for probe in probes]))
        for probe in probes:
            await probe.running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(probe.ended for probe in probes)

    asyncio.run(check())


def test_together_begins_each_when_cancelled_at_once() -> None:
    """Only a task that has begun can report the reason for its end to the other side."""

    async def check() -> None:
        probes = [Probe(), Probe()]
        task = asyncio.ensure_future(together([probe.wait() for probe in probes]))
        asyncio.get_running_loop().call_soon(task.cancel)  # between the first step of `task` and those of the probes
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(probe.ended for probe in probes)

    asyncio.run(check())


def test_merged_begins_each_when_cancelled_at_once() -> None:
    async def check() -> None:
        probes = [Probe(), Probe()]

        async def read() -> None:
            async for _ in merged([probe.stream() for probe in probes]):
                pass

        task = asyncio.ensure_future(read())
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(probe.ended for probe in probes)

    asyncio.run(check())


def test_merged_yields_everything_in_each_streams_order() -> None:
    async def check() -> None:
        seen = [item async for item in merged([count(3), count(0), count(2)])]
        assert [number for index, number in seen if index == 0] == [0, 1, 2]
        assert [number for index, number in seen if index == 2] == [0, 1]
        assert len(seen) == 5

    asyncio.run(check())


def test_closing_merged_closes_every_stream() -> None:
    async def check() -> None:
        probes = [Probe(), Probe()]
        async with aclosing(merged([probe.stream() for probe in probes])) as items:
            await anext(items)
            await anext(items)
            await probes[0].running.wait()
        assert all(probe.ended for probe in probes)

    asyncio.run(check())


def test_merged_closes_the_others_when_one_fails() -> None:
    async def check() -> None:
        probe = Probe()

        async def failing() -> AsyncGenerator[int, None]:
            yield await fail_after(probe.running)

        with pytest.raises(ValueError, match="planted"):
            async for _ in merged([probe.stream(), failing()]):
                pass
        assert probe.ended

    asyncio.run(check())

"""Shared looks at a manager: one thread serves all waiting requests, and a look that began too early does not count."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from kvroom.status.shared_check import SharedCheck


def test_many_that_wait_take_one_thread() -> None:
    numbers = itertools.count(1)
    lock = threading.Lock()

    def look() -> int:
        assert lock.acquire(blocking=False), "two looks at the same time"
        number = next(numbers)
        lock.release()
        return number

    async def ask() -> list[int | None]:
        shared = SharedCheck(look)
        return await asyncio.gather(*(shared.until(lambda seen: seen >= 3, 20) for _ in range(500)))

    seen = asyncio.run(ask())
    assert set(seen) <= {3, 4, 5}, "each waits for the third look, or the next ones"


def test_a_look_that_began_before_does_not_count() -> None:
    """Its result may be older than the request."""
    began, go_on = threading.Event(), threading.Event()
    now = ["before"]

    def look() -> str:
        seen = now[0]
        began.set()
        assert go_on.wait(20)
        return seen

    async def ask() -> str | None:
        shared = SharedCheck(look)
        first = asyncio.ensure_future(shared.until(bool, 20))
        await asyncio.to_thread(began.wait, 20)
        now[0] = "after"
        second = asyncio.ensure_future(shared.until(bool, 20))
        await asyncio.sleep(0)  # the second request has joined
        go_on.set()
        assert await first == "before"
        return await second

    assert asyncio.run(ask()) == "after"


def test_who_waits_in_vain_gets_none_although_the_look_goes_on() -> None:
    go_on = threading.Event()

    async def ask() -> bool | None:
        shared = SharedCheck(lambda: go_on.wait(20))
        said = await shared.until(bool, 0.01)
        go_on.set()
        return said

    assert asyncio.run(ask()) is None


def test_a_fault_is_raised_where_it_is_waited_for() -> None:
    def look() -> bool:
        raise LookupError("closed")

    async def ask() -> list[bool | BaseException | None]:
        shared = SharedCheck(look)
        return await asyncio.gather(*(shared.until(bool, 20) for _ in range(3)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["closed"] * 3


@pytest.mark.parametrize("within_s", [0.0, 0.05])
def test_looks_are_repeated_until_the_time_is_over(within_s: float) -> None:
    looks = itertools.count()

    async def ask() -> int | None:
        return await SharedCheck(lambda: next(looks)).until(lambda _: False, within_s, every_s=0.001)

    assert asyncio.run(ask()) is None

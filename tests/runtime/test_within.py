"""A wait with a limit: the result of the work, the limit, and a cancellation at any moment, including the last."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from kvroom.bootstrap.directory import NotReady, RankInfo
from kvroom.plan import Parallel, Place
from kvroom.runtime.link import Links
from kvroom.runtime.resolver import Resolver
from kvroom.runtime.within import within

LONG_S = 30.0
TURNS = 8
"""More turns of the loop than pass between the end of a query to the directory and the next one."""


async def turns(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run the work; no task may be left, and no exception may be lost."""

    async def watched() -> None:
        lost: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: lost.append(what))
        await work
        await turns(2)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not lost

    asyncio.run(watched())


def test_it_returns_and_raises_what_the_work_does() -> None:
    async def answer(what: int | Exception) -> int:
        await turns(1)
        if isinstance(what, Exception):
            raise what
        return what

    async def main() -> None:
        assert await within(answer(7), LONG_S) == 7
        with pytest.raises(NotReady, match="later"):
            await within(answer(NotReady("later")), LONG_S)

    run(main())


def test_after_the_limit_the_work_has_ended() -> None:
    async def main() -> None:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(asyncio.TimeoutError):
            await within(never, 0.001)
        assert never.cancelled()

    run(main())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("late", range(3))
def test_a_cancellation_is_one_also_when_the_work_has_just_ended(fails: bool, late: int) -> None:
    async def main() -> None:
        work = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(work, LONG_S))
        await turns(2)
        if fails:
            work.set_exception(NotReady("later"))
        else:
            work.set_result(None)
        await turns(late)
        if not task.done():
            assert task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif fails:
            task.exception()

    run(main())


@pytest.mark.parametrize("late", range(TURNS))
def test_a_resolver_closes_at_once_also_when_an_answer_has_just_come(late: int) -> None:
    """The directory answers that a rank is missing, and this number of turns later the manager is closed."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        answer = loop.create_future()

        async def listed(address: str, **_: object) -> list[RankInfo]:
            if not asked.done():
                asked.set_result(address)
            await answer
            return []

        class NoHandler:
            def __getattr__(self, name: str) -> object: ...

        links = Links(NoHandler(), identity=b"")  # type: ignore[arg-type]  # no peer links here, so no call comes
        resolver = Resolver(links, b"", LONG_S, Parallel(), Place(0, 0, 0, 0), listed=listed)
        finding = asyncio.ensure_future(resolver.find("127.0.0.1:1", 7))
        await asked
        answer.set_result(None)
        await turns(late)
        await asyncio.wait_for(resolver.close(), LONG_S / 3)
        with pytest.raises(asyncio.CancelledError):
            await finding

    run(main())

"""Repeated log records are written once a second with a count; a record that comes once is never lost."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest

from kvroom.bootstrap.threads import own_loop
from kvroom.listening.repeats import MAX_KINDS, Repeats

LOGGER = logging.getLogger("kvroom.test_repeats")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> Repeats:
    caplog.set_level(logging.INFO, LOGGER.name)
    return Repeats(LOGGER, clock=clock)


def test_one_of_a_kind_is_written_each_second_and_says_how_many_were_not(
    log: Repeats, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        log.warning("refused %s", number)
    clock.now_s += 0.999
    log.warning("refused %s", "late")
    clock.now_s += 0.001
    log.warning("refused %s", "next")
    log.warning("refused %s", "again")
    clock.now_s += 10
    log.warning("refused %s", "at last")
    clock.now_s += 10
    log.warning("refused %s", "alone")
    assert caplog.messages == [
        "refused 0",
        "refused next (and 1000 more like this, not shown)",
        "refused at last (and 1 more like this, not shown)",
        "refused alone",
    ]


def test_another_level_text_or_peer_is_another_kind(log: Repeats, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        log.warning("one")
        log.info("one")
        log.warning("two")
        for peer in ("a", "b"):
            log.warning("one", extra={"peer": peer})
    assert caplog.messages == ["one", "one", "two", "one", "one"]
    assert [getattr(record, "peer", None) for record in caplog.records] == [None, None, None, "a", "b"]


def test_peers_without_number_share_one_kind(log: Repeats, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10 * MAX_KINDS):
        log.warning("lost", extra={"peer": str(number)})
    assert len(log._written) <= MAX_KINDS + 1
    assert len(caplog.messages) <= MAX_KINDS + 1
    clock.now_s += 1
    caplog.clear()
    for number in range(10 * MAX_KINDS, 20 * MAX_KINDS):
        log.warning("lost", extra={"peer": str(number)})
    assert len(log._written) <= MAX_KINDS + 1
    assert len(caplog.messages) <= MAX_KINDS + 1
    assert "lost (and " in "".join(caplog.messages)


def test_a_level_that_is_off_is_not_even_counted(log: Repeats, caplog: pytest.LogCaptureFixture) -> None:
    log.debug("seen")
    caplog.set_level(logging.DEBUG, LOGGER.name)
    log.debug("seen")
    assert caplog.messages == ["seen"]


def test_a_fault_that_a_loop_of_ours_meets_again_and_again_is_one_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def fails(number: int) -> None:
        raise ValueError(f"for the {number}th time")

    async def body() -> None:
        loop = asyncio.get_running_loop()
        for number in range(100):
            loop.call_soon(fails, number)
        loop.call_soon(os.environ.pop, "KVROOM_THAT_NOBODY_SETS")
        await asyncio.sleep(0)

    loop = own_loop()
    loop.run_until_complete(body())
    loop.close()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError, KeyError]
    assert "ValueError in an event loop: Exception in callback" in caplog.messages[0]

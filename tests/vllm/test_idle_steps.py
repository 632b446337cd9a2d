"""The time that a worker's idle step waits: `idle_wait_s` with a room of its own, else as long as it has been idle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from identities import PROMPT
from kvroom import KVLayout, KVManager, Parallel
from kvroom.adapters.vllm.orders import Expect, Orders
from kvroom.adapters.vllm.worker import WorkerSide
from kvroom.plan.layout import array_regions

WAIT_S = 3600.0
UNREACHABLE = "127.0.0.1:9"
Start = Callable[[int], "Idle"]


class Waits(threading.Event):
    """An event whose `wait` records the timeout and returns immediately."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.asked_s.append(timeout)
        return False


class Idle:
    """The first worker of an engine with `ranks` tensor-parallel ranks, with a real manager."""

    def __init__(self, ranks: int) -> None:
        self._pool = np.zeros((4, 16, 8), np.uint8)
        regions = array_regions(
            self._pool.ctypes.data, self._pool.shape, self._pool.strides, "PTD", itemsize=1, components=("kv",)
        )
        layout = KVLayout(tuple(regions), "uint8")
        self.side = WorkerSide(
            lambda wake: KVManager(layout, transport="tcp", parallel=Parallel(tp=ranks), on_change=wake),
            idle_wait_s=WAIT_S,
        )
        self.waits = self.side._news = Waits()

    def step(self, *, idle: bool) -> float:
        """Take one step without a report. Return the seconds that it waited."""
        self.waits.asked_s.clear()
        assert not self.side.report(idle=idle)
        return sum(self.waits.asked_s)


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as undo:

        def one(ranks: int) -> Idle:
            engine = Idle(ranks)
            undo.callback(engine.side.close)
            return engine

        yield one


def test_a_step_that_computes_waits_for_nothing(start: Start) -> None:
    engine = start(2)
    engine.side._active_s -= 2 * WAIT_S
    assert engine.step(idle=False) == 0


def test_an_engine_of_one_rank_waits_only_for_its_rooms(start: Start) -> None:
    engine = start(1)
    engine.side._active_s -= 2 * WAIT_S
    assert engine.step(idle=True) == 0
    engine.side.begin(Orders(expects=[Expect("one", 1, UNREACHABLE, PROMPT)]))
    assert engine.step(idle=True) == WAIT_S


def test_a_rank_without_rooms_waits_as_long_as_it_had_none(start: Start) -> None:
    """vLLM steps such a rank because another one has a room, whose report must not be delayed much."""
    engine = start(2)
    engine.step(idle=False)
    assert engine.step(idle=True) < WAIT_S / 2
    engine.side._active_s -= WAIT_S / 2
    assert WAIT_S / 2 <= engine.step(idle=True) < WAIT_S
    engine.side._active_s -= WAIT_S
    assert engine.step(idle=True) == WAIT_S
    engine.step(idle=False)
    assert engine.step(idle=True) < WAIT_S / 2

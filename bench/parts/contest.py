"""Run contenders in turns, so that a change of the machine's load affects all of them, and compare medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvroom.plan.blocks import U64


class Contender(NamedTuple):
    """A named function that moves all blocks once and returns the seconds that it took.

    `yardstick` names the contender to compare with; `goal` is the ratio that should be reached.
    """

    name: str
    move: Callable[[], float]
    yardstick: str = ""
    goal: float | None = None


def timed(move: Callable[[], None]) -> Callable[[], float]:
    """Return a function that calls `move` and returns the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        move()
        return time.perf_counter() - start

    return run


def places(count: int, block_bytes: int, seed: int) -> U64:
    """Return the offsets of `count` blocks in random order."""
    order = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    offsets: U64 = order * np.uint64(block_bytes)
    return offsets


def contest(contenders: Sequence[Contender], nbytes: int, rounds: int) -> dict[str, float]:
    """Return GB/s of each contender: the median over rounds in which each has one turn, after one unmeasured round.

    Every second round runs in reverse order, so that no contender always follows the same one.
    """
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds + 1):
        for contender in contenders[:: -1 if turn % 2 else 1]:
            seconds = contender.move()
            if turn:
                taken[contender.name].append(seconds)
    return {name: nbytes / statistics.median(times) / 1e9 for name, times in taken.items()}


def show(contenders: Sequence[Contender], speeds: dict[str, float]) -> None:
    """Print the speeds, and their ratios to the yardsticks."""
    print(f"{'':34} {'GB/s':>6}   ratio")
    for name, _, yardstick, goal in contenders:
        text = f"{name:34} {speeds[name]:6.2f}"
        if yardstick:
            ratio = speeds[name] / speeds[yardstick]
            text += f"   {ratio:4.2f} of {yardstick}" + (f" (goal {goal})" if goal else "")
        print(text)

"""`python -m kvroom_lab.simulate`: run seeds of the simulation, and report a broken law with its seed and its trace.

Exit status 1 if a law was broken. `--trace SEED` prints one run, whether or not it breaks a law.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable

import msgspec

from kvroom_lab.simulation.run import Outcome, run

TRACE_LINES = 400
"""The number of lines printed from the end of a failing trace; `--trace` prints all of it."""


class SimulationFailed(AssertionError):
    """A law was broken. The text has the seed, the law, the end of the trace and the command that repeats the run."""

    def __init__(self, text: str, seed: int) -> None:
        super().__init__(text)
        self.seed = seed


class Summary(msgspec.Struct, frozen=True):
    """The sum over many seeds, all of which kept the laws."""

    seeds: int
    events: int
    tally: Counter[str]
    cpu_s: float


def simulate(seeds: Iterable[int]) -> Summary:
    """Run these seeds. Raise `SimulationFailed` at the first one that breaks a law."""
    count = events = 0
    tally: Counter[str] = Counter()
    started = time.process_time()
    for seed in seeds:
        outcome = run(seed)
        if outcome.broken is not None:
            raise SimulationFailed(explain(outcome), seed)
        count += 1
        events += outcome.events
        tally += outcome.tally
    return Summary(count, events, tally, time.process_time() - started)


def explain(outcome: Outcome) -> str:
    """Repeat a run with tracing; return its seed, the law, the trace and the command that repeats it."""
    again = run(outcome.seed, tracing=True)
    if again.broken != outcome.broken:
        return f"seed {outcome.seed}: {outcome.broken}\nbut repeated it gives: {again.broken}"
    lines = again.trace[-TRACE_LINES:]
    left_out = len(again.trace) - len(lines)
    return "\n".join(
        [
            f"seed {outcome.seed}: {outcome.broken}",
            *([f"({left_out} earlier lines are left out)"] if left_out else []),
            *lines,
            f"seed {outcome.seed}: {outcome.broken}",
            f"repeat it: python -m kvroom_lab.simulate --trace {outcome.seed}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvroom_lab.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first one (default: %(default)s)")
    parser.add_argument("--trace", type=int, metavar="SEED", help="run this seed alone and print its whole trace")
    options = parser.parse_args(arguments)
    if options.trace is not None:
        outcome = run(options.trace, tracing=True)
        print("\n".join(outcome.trace))
        print(f"seed {outcome.seed}: {outcome.broken or 'every law was kept'}")
        return 0 if outcome.broken is None else 1
    try:
        summary = simulate(range(options.first, options.first + options.seeds))
    except SimulationFailed as failed:
        print(failed)
        return 1
    for what, times in sorted(summary.tally.items()):
        print(f"{times:10,}  {what}")
    each_ms = 1000 * summary.cpu_s / max(1, summary.seeds)
    print(f"{summary.seeds:,} seeds, {summary.events:,} events, {summary.cpu_s:.1f} s of CPU, {each_ms:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())

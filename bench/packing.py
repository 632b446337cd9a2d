"""Small blocks: the cost of a change of the tensor-parallel width for each transport, in one run.

    python bench/packing.py [--mib 128] [--rounds 5] [--piece-bytes 512 128] [--only vm shm both tcp nixl mooncake]

There are two processes. TP 2->4 makes blocks of one token, strided in the source and adjacent in the sink; 4->2 is the
reverse. Both are compared with the equal layout, whose blocks are whole pages of 16 tokens, on the same bytes.
One-sided engines also send the small blocks one by one, on an eighth of the bytes, because that is slow. Contenders
take turns and medians are compared. Every byte is checked before the timing.

Goals: half of the equal layout's throughput over `local` and `tcp`; five times one by one over the engines. A missed
goal is only printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from kvroom.transports import probe
from parts.ends import Way
from parts.pairs import Kind, Pair

EQUAL_GOAL, SINGLY_GOAL = 0.5, 5.0
SINGLY_SHARE = 8  # the share of the bytes that is sent one by one


class Case(NamedTuple):
    """A transport and its options. `one_sided`: the setting with which it sends small blocks one by one."""

    transport: str
    options: dict[str, object] = {}
    shared: bool = False
    one_sided: bool = False


CASES = {
    "vm": Case("local", {"mode": "vm"}),
    "shm": Case("local", {"mode": "shm"}, shared=True),
    "both": Case("local", shared=True),
    "tcp": Case("tcp"),
    "nixl": Case("nixl", one_sided=True),
    "mooncake": Case("mooncake", {"trusted_fabric": True}, one_sided=True),
}


class Contender(NamedTuple):
    """A plan that a pair keeps, and the bytes that it moves. `goal`: the minimum ratio to the yardstick."""

    name: str
    pair: Pair
    plan: str
    nbytes: int
    yardstick: str = ""
    goal: float = 0.0

    def move(self) -> float:
        """Move the blocks once and return GB/s."""
        self.pair.use(self.plan)
        return self.nbytes / self.pair.move(Way()) / 1e9


def contest(contenders: Sequence[Contender], rounds: int) -> dict[str, float]:
    """Return the median GB/s of each over rounds in which each has one turn, every second round in reverse order."""
    speeds: dict[str, list[float]] = {each.name: [] for each in contenders}
    for turn in range(rounds + 1):
        for each in contenders[:: -1 if turn % 2 else 1]:
            speed = each.move()
            if turn:
                speeds[each.name].append(speed)
    return {name: statistics.median(each) for name, each in speeds.items()}


def entered(
    case: Case, nbytes: int, piece_bytes: int, open_pair: Callable[[dict[str, object]], Pair]
) -> list[Contender]:
    """Open the contenders for one transport and one piece size, and check the bytes that they move."""
    pair = open_pair(case.options)
    found = [Contender("equal", pair, "equal", nbytes)]
    for widths in ("2->4", "4->2"):
        found.append(Contender(widths, pair, widths, nbytes, "equal", 0.0 if case.one_sided else EQUAL_GOAL))
    if case.one_sided:
        singly = open_pair({**case.options, "packing": "never"})
        for i, widths in enumerate(("2->4", "4->2"), 1):
            name = f"{widths}, one by one"
            found.append(Contender(name, singly, widths, nbytes // SINGLY_SHARE))
            found[i] = found[i]._replace(yardstick=name, goal=SINGLY_GOAL)
    for each in found:
        each.pair.keep(each.plan, each.nbytes, piece_bytes, each.plan)
        each.pair.use(each.plan)
        each.pair.check(Way())
    return found


def compare(name: str, piece_bytes: int, nbytes: int, rounds: int) -> list[str]:
    """Run one transport with pieces of one size; print all figures and return the lines of the summary."""
    case, lines = CASES[name], []
    print(f"== {name}, pieces of {piece_bytes} bytes")
    with ExitStack() as stack:

        def open_pair(options: dict[str, object]) -> Pair:
            kind = Kind("parts.ends:Ours", {"transport": case.transport, **options}, shared=case.shared)
            pair = Pair(kind, 4 * nbytes)
            stack.callback(pair.close)
            return pair

        contenders = entered(case, nbytes, piece_bytes, open_pair)
        speeds = contest(contenders, rounds)
    for each in contenders:
        text = f"{each.name:18} {speeds[each.name]:6.2f} GB/s"
        for other in dict.fromkeys(("equal", each.yardstick)):
            if other and other != each.name:
                text += f"   {speeds[each.name] / speeds[other]:5.2f} of {other}"
        print(text, flush=True)
        if each.goal:
            ratio = speeds[each.name] / speeds[each.yardstick]
            verdict = "met" if ratio >= each.goal else "missed"
            what = f"{name}, {each.name}, {piece_bytes} bytes"
            lines.append(f"{what:30} {ratio:5.2f} of {each.yardstick:18} goal {each.goal} {verdict}")
    print()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--piece-bytes", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    print(f"{options.mib} MiB; {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}\n")
    lines = []
    for name in options.only:
        missing = probe(CASES[name].transport).missing
        if missing:
            print(f"== {name} cannot run here: {'; '.join(str(each) for each in missing)}\n")
            continue
        for piece_bytes in options.piece_bytes:
            lines += compare(name, piece_bytes, options.mib << 20, options.rounds)
    print("\n".join(lines))
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()

"""The cost of kvroom's layer: every transport against the part that it is built on, driven directly, in one run.

    python bench/engines.py [--mib 512] [--rounds 9] [--block-kib 4 32 256 1024] [--only nixl mooncake local tcp memory]

Every contender is two processes with a pool in each (`memory`: one process); blocks lie at random places of both pools.
The bare part runs in each of its ways on a quarter of the blocks; the best two run against kvroom's transport, and the
faster one is the yardstick. Contenders take turns and medians are compared. Latency is that of one page of 4 KiB, from
the call to its result. Each contender's bytes are checked once for each block size before the timing.

Goals: kvroom's layer costs at most 5 % of the throughput and 100 us of latency; `local` is at least twice as fast as
NIXL and Mooncake, driven bare on the same machine, at 32 KiB, all in huge pages or all in 4 KiB pages. A missed goal is
only printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from kvroom.transports import probe
from parts import bare_local, bare_mooncake, bare_nixl
from parts.contest import Contender, contest, show
from parts.ends import Way
from parts.pairs import Kind, Pair

COST_GOAL, LATENCY_GOAL_US, LOCAL_GOAL = 0.95, 100.0, 2.0
LOCAL_BLOCK_KIB = 32
GROUPS, GROUP = 25, 100  # transfers of one page: groups, and transfers in each


class Bare(NamedTuple):
    """A bare part to compare with, and the ways in which it can be driven."""

    name: str
    kind: Kind
    ways: Sequence[Way]


class Entrant(NamedTuple):
    """An open pair, and the way in which it is driven."""

    name: str
    pair: Pair
    way: Way


_NIXL = [
    Bare("bare nixl, spinning", Kind("parts.bare_nixl:BareNixl", spins=True), bare_nixl.WAYS),
    Bare("bare nixl, sleeping", Kind("parts.bare_nixl:BareNixlSleeping"), bare_nixl.WAYS),
]
_MOONCAKE = [Bare("bare mooncake", Kind("parts.bare_mooncake:BareMooncake"), bare_mooncake.WAYS)]
BARE = {
    "nixl": _NIXL,
    "mooncake": _MOONCAKE,
    "local": [Bare("bare process_vm_writev", Kind("parts.bare_local:BareLocal"), bare_local.WAYS)],
    "tcp": [Bare("bare writev/readv", Kind("parts.bare_tcp:BareTcp"), [Way()])],
    "memory": [Bare("bare memmove", Kind("parts.ends:BareMemory", one_process=True), [Way()])],
}


class Results:
    """The lines of the summary that is printed last."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str, figures: str, met: bool) -> None:
        self.lines.append(f"{what:34} {figures:66} goal {'met' if met else 'missed'}")


@contextmanager
def opened(kind: Kind, nbytes: int) -> Iterator[Pair]:
    """Open a pair for the duration of a `with` block."""
    pair = Pair(kind, nbytes)
    try:
        yield pair
    finally:
        pair.close()


def ours(name: str) -> Kind:
    return Kind(
        "parts.ends:Ours", {"transport": name, "trusted_fabric": name == "mooncake"}, one_process=name == "memory"
    )


def heats(bare: Sequence[Bare], pairs: Sequence[Pair], count: int, block_bytes: int) -> list[Entrant]:
    """Run every bare part in each of its ways over a quarter of the blocks; return the best two."""
    few = max(count // 4, 1)
    tried = [
        Entrant(f"{each.name} {way}", pair, way)
        for each, pair in zip(bare, pairs, strict=True)
        for way in [way for way in each.ways if way.blocks <= few] or each.ways[:1]
    ]
    for pair in pairs:
        pair.plan(few, block_bytes)
    if len(tried) > 1:
        speeds = contest([Contender(e.name, partial(e.pair.move, e.way)) for e in tried], few * block_bytes, 3)
        tried.sort(key=lambda entrant: speeds[entrant.name], reverse=True)
        print("  heats: " + ", ".join(f"{e.name} {speeds[e.name]:.2f}" for e in tried))
    return tried[:2]


def final(entrants: Sequence[Entrant], count: int, block_bytes: int, rounds: int) -> dict[str, float]:
    """Check every entrant's bytes, run them in turns, print and return their GB/s."""
    for entrant in entrants:
        entrant.pair.plan(count, block_bytes)
        entrant.pair.check(entrant.way)
    contenders = [Contender(e.name, partial(e.pair.move, e.way)) for e in entrants]
    speeds = contest(contenders, count * block_bytes, rounds)
    best = max((e.name for e in entrants if e.name.startswith("bare")), key=lambda name: speeds[name])
    show([c if c.name == best else c._replace(yardstick=best) for c in contenders], speeds)
    return speeds


def latencies(entrants: Sequence[Entrant]) -> dict[str, float]:
    """Return the median microseconds of a transfer of one page, taken in groups that take turns."""
    taken: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for group in range(GROUPS):
        for entrant in entrants[:: -1 if group % 2 else 1]:
            taken[entrant.name] += entrant.pair.pages(GROUP, entrant.way)
    return {name: statistics.median(times) * 1e6 for name, times in taken.items()}


def compare(name: str, options: argparse.Namespace, results: Results) -> None:
    """Run one transport against its part driven bare, over all block sizes, and then one page at a time."""
    print(f"== {name}")
    nbytes = options.mib << 20
    with ExitStack() as stack:
        pairs = [stack.enter_context(opened(each.kind, nbytes)) for each in BARE[name]]
        mine = Entrant(name, stack.enter_context(opened(ours(name), nbytes)), Way())
        for kib in options.block_kib:
            block_bytes = kib << 10
            count = nbytes // block_bytes
            best = heats(BARE[name], pairs, count, block_bytes)
            speeds = final([*best, mine], count, block_bytes, options.rounds)
            against = max((e.name for e in best), key=lambda each: speeds[each])
            ratio = speeds[name] / speeds[against]
            figures = f"{speeds[name]:6.2f} GB/s, {ratio:.2f} of {against} ({speeds[against]:.2f})"
            results.add(f"{name}, blocks of {kib} KiB", figures, ratio >= COST_GOAL)
        alone = [
            Entrant(each.name, pair, each.ways[0]._replace(depth=min(each.ways[0].depth, 1)))
            for each, pair in zip(BARE[name], pairs, strict=True)
        ]
        one = latencies([*alone, mine])
    against = min((e.name for e in alone), key=lambda each: one[each])
    more = one[name] - one[against]
    figures = f"{one[name]:6.1f} us, {more:+.1f} to {against} ({one[against]:.1f})"
    results.add(f"{name}, one page of 4 KiB", figures, more <= LATENCY_GOAL_US)
    print(f"  {results.lines[-1]}\n")


def compare_local(options: argparse.Namespace, huge: bool, results: Results) -> None:
    """Run `local` against NIXL and Mooncake, both driven bare, all in pages of one size."""
    pages = "huge pages" if huge else "4 KiB pages"
    print(f"== local and others, blocks of {LOCAL_BLOCK_KIB} KiB, {pages}")
    nbytes, block_bytes = options.mib << 20, LOCAL_BLOCK_KIB << 10
    count = nbytes // block_bytes
    rivals: dict[str, list[str]] = {}
    with ExitStack() as stack:
        entrants = [Entrant("local", stack.enter_context(opened(ours("local")._replace(huge=huge), nbytes)), Way())]
        for name in filter(runs, ("nixl", "mooncake")):
            pairs = [stack.enter_context(opened(each.kind._replace(huge=huge), nbytes)) for each in BARE[name]]
            best = heats(BARE[name], pairs, count, block_bytes)
            rivals[name] = [entrant.name for entrant in best]
            entrants += best
        if rivals:
            speeds = final(entrants, count, block_bytes, options.rounds)
    for names in rivals.values():
        against = max(names, key=lambda each: speeds[each])
        ratio = speeds["local"] / speeds[against]
        figures = f"{speeds['local']:6.2f} GB/s, {ratio:.2f} of {against} ({speeds[against]:.2f})"
        results.add(f"local, {LOCAL_BLOCK_KIB} KiB, {pages}", figures, ratio >= LOCAL_GOAL)
    print()


def runs(name: str) -> bool:
    """Return True if a transport can run here; print the reason if not."""
    missing = probe(name).missing
    if missing:
        print(f"== {name} cannot run here: {'; '.join(str(each) for each in missing)}\n")
    return not missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-kib", type=int, nargs="+", default=[4, 32, 256, 1024])
    parser.add_argument("--only", nargs="+", choices=list(BARE), default=list(BARE))
    options = parser.parse_args()
    results = Results()
    print(f"{options.mib} MiB in scattered blocks; {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}\n")
    for name in options.only:
        if runs(name):
            compare(name, options, results)
    if "local" in options.only and runs("local"):
        for huge in (True, False):
            compare_local(options, huge, results)
    print("\n".join(results.lines))
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()

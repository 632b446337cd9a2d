"""Throughput and latency of `local` and `tcp` against bare copies of the same blocks, in one run.

    python bench/transports.py [--mib 512] [--block-kib 32] [--rounds 5]

Two processes; 512 MiB in scattered blocks of 32 KiB, every block at a random place of both pools. Contenders take turns
and medians are compared, so that a change of the machine's load affects all of them. The yardsticks:
- memmove: one thread, one process, `ctypes.memmove` for each of the same blocks in the same order, same kind of pages;
- take: the same copies by `numpy.take`, a C loop of one memmove per block in the order of the target, for information;
- bare pair: blocking writev(2)/readv(2) over loopback TCP, 1,024 blocks a call, no frames, one final byte as answer.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from functools import partial

import numpy as np

from kvroom.conformance.ends import End, EndSetup, Host
from kvroom.plan.blocks import Blocks
from kvroom.transports.kit.pool import allocate
from kvroom.transports.kit.ranges import u64
from parts.contest import Contender, contest, places, show, timed
from parts.ends import Way
from parts.pairs import Kind, Pair


class SameProcess:
    """Copies of the same blocks within one process."""

    def __init__(self, count: int, block_bytes: int, huge: bool) -> None:
        self._pools = [allocate(count * block_bytes, huge=huge) for _ in range(2)]
        self._block_bytes = block_bytes
        self._source, self._target = (
            np.frombuffer(pool.buffer, np.uint8).reshape(count, block_bytes) for pool in self._pools
        )
        self._source[:], self._target[:] = 3, 1
        src, dst = (places(count, block_bytes, seed) for seed in (1, 2))
        self._from = (src + np.uint64(self._pools[0].address)).tolist()
        self._to = (dst + np.uint64(self._pools[1].address)).tolist()
        self._where = np.empty(count, np.int64)
        self._where[dst // np.uint64(block_bytes)] = src // np.uint64(block_bytes)

    def memmove(self) -> None:
        """Copy block by block, in order."""
        for to, start in zip(self._to, self._from, strict=True):
            ctypes.memmove(to, start, self._block_bytes)

    def take(self) -> None:
        """Copy in one call, in the order of the target."""
        np.take(self._source, self._where, axis=0, out=self._target, mode="clip")


def between(name: str, options: dict[str, object], host: Host, count: int, block_bytes: int, huge: bool) -> Link:
    """Open both ends of a transport, one of them in another process."""
    shared = options.get("mode") == "shm"
    setup = EndSetup(name, options, [count * block_bytes], seed=1, shared=shared, huge=huge)
    return Link(End.here(setup), host.open(setup._replace(seed=2)), count, block_bytes)


class Link:
    """Two connected ends and the blocks to move between them."""

    def __init__(self, source: End, sink: End, count: int, block_bytes: int) -> None:
        self._source, self._sink = source, sink
        self._peer = source.connect(sink.describe())
        self._grant = sink.grant(u64(sink.addresses), u64([count * block_bytes]))
        sink.bind(self._grant, sink.connect(source.describe()))
        src, dst = (
            np.uint64(end.addresses[0]) + places(count, block_bytes, seed) for end, seed in ((source, 1), (sink, 2))
        )
        self._blocks = Blocks(src, dst, np.full(count, block_bytes, np.uint64))

    def move(self) -> None:
        """Move all blocks."""
        self._source.move(self._peer, self._blocks, self._grant)

    def latency_us(self, nbytes: int, times: int) -> float:
        """Return the median time of one small transfer, from `submit` to its result."""
        one = Blocks(self._blocks.src[:1], self._blocks.dst[:1], u64([nbytes]))
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            self._source.move(self._peer, one, self._grant)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) * 1e6

    def close(self) -> None:
        self._source.close()
        self._sink.close()


def latencies(link: Link) -> str:
    return ", ".join(f"{kib} KiB {link.latency_us(kib << 10, 2000):.0f} us" for kib in (2, 32, 64))


def local_contest(count: int, block_bytes: int, rounds: int, huge: bool) -> None:
    pages = "huge pages" if huge else "4 KiB pages"
    here = SameProcess(count, block_bytes, huge)
    yardstick = f"memmove, {pages}"
    contenders = [Contender(yardstick, timed(here.memmove)), Contender(f"take, {pages}", timed(here.take), yardstick)]
    links, hosts = [], []
    tried: list[dict[str, object]] = [
        {"threads": 1},
        {"threads": 2},
        {"mode": "shm", "threads": 1},
        {"mode": "shm", "threads": 2},
    ]
    for options in tried:
        if "mode" in options and not huge:
            continue
        hosts.append(Host())
        links.append(between("local", options, hosts[-1], count, block_bytes, huge))
        name = f"local {options.get('mode', 'vm')}, threads={options['threads']}, {pages}"
        contenders.append(Contender(name, timed(links[-1].move), yardstick, 0.8 if "mode" not in options else None))
    show(contenders, contest(contenders, count * block_bytes, rounds))
    print("local vm, one transfer: " + latencies(links[0]))
    for link, host in zip(links, hosts, strict=True):
        link.close()
        host.close()


def tcp_contest(count: int, block_bytes: int, rounds: int) -> None:
    bare = Pair(Kind("parts.bare_tcp:BareTcp"), count * block_bytes)
    bare.plan(count, block_bytes)
    with Host() as host:
        link = between("tcp", {}, host, count, block_bytes, True)
        contenders = [
            Contender("memmove, huge pages", timed(SameProcess(count, block_bytes, True).memmove)),
            Contender("bare pair", partial(bare.move, Way()), "memmove, huge pages"),
            Contender("tcp", timed(link.move), "bare pair", 0.9),
        ]
        show(contenders, contest(contenders, count * block_bytes, rounds))
        print("tcp, one transfer: " + latencies(link))
        link.close()
    bare.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--block-kib", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    block_bytes = options.block_kib << 10
    count = (options.mib << 20) // block_bytes
    print(
        f"{count} scattered blocks of {options.block_kib} KiB; {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}\n"
    )
    local_contest(count, block_bytes, options.rounds, huge=True)
    print()
    local_contest(count, block_bytes, options.rounds, huge=False)
    print()
    tcp_contest(count, block_bytes, options.rounds)
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()

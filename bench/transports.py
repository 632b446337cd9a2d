"""Throughput and latency of `local` and `tcp` against bare copies of the same blocks, in one run.

    python bench/transports.py [--mib 512] [--block-kib 32] [--rounds 5]

Two processes; 512 MiB in scattered blocks of 32 KiB, every block at a random place of both pools. Contenders take turns
and medians are compared, so that a change of the machine's load meets all of them. The yardsticks:
- memmove: one thread, one process, `ctypes.memmove` for each of the same blocks in the same order, same kind of pages;
- take: the same copies by `numpy.take`, a C loop of one memmove per block in the order of the target, for information;
- bare pair: blocking writev(2)/readv(2) over loopback TCP, 1,024 blocks a call, no frames, one final byte as answer.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvroom.plan.blocks import U64, Blocks
from kvroom.testing.ends import End, Host
from kvroom.transports.iovec import Segments
from kvroom.transports.pool import allocate
from kvroom.transports.tcp_frames import tune
from kvroom.transports.transfers import u64

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.readv, _libc.writev):
    _call.argtypes, _call.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t


class Contender(NamedTuple):
    """Something that moves all blocks once when called; `yardstick` names what it is compared with."""

    name: str
    move: Callable[[], None]
    yardstick: str
    goal: float | None


def places(count: int, block_bytes: int, seed: int) -> U64:
    """Return the offsets of `count` blocks in random order."""
    order = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    offsets: U64 = order * np.uint64(block_bytes)
    return offsets


class SameProcess:
    """The copies of the same blocks within one process."""

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
    """Open both ends of a transport, one of them in the other process."""
    nbytes, shared = [count * block_bytes], options.get("mode") == "shm"
    source = End.here(name, options, nbytes, 1, shared, huge)
    return Link(source, host.open(name, options, nbytes, 2, shared, huge), count, block_bytes)


class Link:
    """Two connected ends and the blocks to move between them."""

    def __init__(self, source: End, sink: End, count: int, block_bytes: int) -> None:
        self._source, self._sink = source, sink
        self._peer = source.connect(sink.describe())
        sink.connect(source.describe())
        self._grant = sink.grant(u64(sink.addresses), u64([count * block_bytes]))
        src, dst = (
            np.uint64(end.addresses[0]) + places(count, block_bytes, seed) for end, seed in ((source, 1), (sink, 2))
        )
        self._blocks = Blocks(src, dst, np.full(count, block_bytes, np.uint64))

    def move(self) -> None:
        """Move all blocks."""
        self._source.move(self._peer, self._blocks, self._grant)

    def latency_us(self, nbytes: int, times: int) -> float:
        """Return the median time of one small transfer, from submit to the result in hand."""
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


def pump(call: Callable[[int, int, int], int], fd: int, segments: Segments) -> None:
    """Call readv or writev until all segments are done."""
    while segments.left:
        moved = call(fd, *segments.window())
        if moved <= 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        segments.advance(moved)


def bare_sink(fd: int, count: int, block_bytes: int) -> None:
    """The reading side of the bare pair; ends with the connection."""
    pool = allocate(count * block_bytes)
    np.frombuffer(pool.buffer, np.uint8)[:] = 1
    dst = np.uint64(pool.address) + places(count, block_bytes, 2)
    length = np.full(count, block_bytes, np.uint64)
    with socket.socket(fileno=fd) as connection:
        connection.sendall(b"+")
        while connection.recv(1, socket.MSG_PEEK):
            pump(_libc.readv, fd, Segments(dst, length))
            connection.sendall(b"+")


class BarePair:
    """The yardstick of `tcp`."""

    def __init__(self, count: int, block_bytes: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            tune(listener)
            self._socket = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        tune(self._socket)
        tune(theirs)
        with theirs:
            command = [sys.executable, __file__, "--bare-sink", *map(str, (theirs.fileno(), count, block_bytes))]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._pool = allocate(count * block_bytes)
        np.frombuffer(self._pool.buffer, np.uint8)[:] = 3
        self._src = np.uint64(self._pool.address) + places(count, block_bytes, 1)
        self._length = np.full(count, block_bytes, np.uint64)
        self._socket.recv(1)

    def move(self) -> None:
        pump(_libc.writev, self._socket.fileno(), Segments(self._src, self._length))
        self._socket.recv(1)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def contest(contenders: Sequence[Contender], nbytes: int, rounds: int) -> dict[str, float]:
    """Return GB/s of each contender: the median over rounds in which each has one turn, after one unmeasured round."""
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds + 1):
        for contender in contenders:
            start = time.perf_counter()
            contender.move()
            if turn:
                taken[contender.name].append(time.perf_counter() - start)
    return {name: nbytes / statistics.median(times) / 1e9 for name, times in taken.items()}


def show(contenders: Sequence[Contender], speeds: dict[str, float]) -> None:
    print(f"{'':34} {'GB/s':>6}   ratio")
    for name, _, yardstick, goal in contenders:
        text = f"{name:34} {speeds[name]:6.2f}"
        if yardstick:
            ratio = speeds[name] / speeds[yardstick]
            text += f"   {ratio:4.2f} of {yardstick}" + (f" (goal {goal})" if goal else "")
        print(text)


def latencies(link: Link) -> str:
    return ", ".join(f"{kib} KiB {link.latency_us(kib << 10, 2000):.0f} us" for kib in (2, 32, 64))


def local_contest(count: int, block_bytes: int, rounds: int, huge: bool) -> None:
    pages = "huge pages" if huge else "4 KiB pages"
    here = SameProcess(count, block_bytes, huge)
    yardstick = f"memmove, {pages}"
    contenders = [Contender(yardstick, here.memmove, "", None), Contender(f"take, {pages}", here.take, yardstick, None)]
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
        contenders.append(Contender(name, links[-1].move, yardstick, 0.8 if "mode" not in options else None))
    show(contenders, contest(contenders, count * block_bytes, rounds))
    print("local vm, one transfer: " + latencies(links[0]))
    for link, host in zip(links, hosts, strict=True):
        link.close()
        host.close()


def tcp_contest(count: int, block_bytes: int, rounds: int) -> None:
    with Host() as host:
        bare, link = BarePair(count, block_bytes), between("tcp", {}, host, count, block_bytes, True)
        contenders = [
            Contender("memmove, huge pages", SameProcess(count, block_bytes, True).memmove, "", None),
            Contender("bare pair", bare.move, "memmove, huge pages", None),
            Contender("tcp", link.move, "bare pair", 0.9),
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
    parser.add_argument("--bare-sink", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_sink:
        bare_sink(*options.bare_sink)
        return
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

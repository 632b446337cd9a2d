"""Open malformed connections to every port of a prefill and a decode worker while they hand rooms over.

python -m fuzz.ports [--connections N] [--transport NAME]

Prints the resident memory, threads and descriptors of both workers at the half and at the end, and how many hand-offs
were served at the same time. Both run with the settings of `kvroom_lab.allocator`, so that resident memory shows what
they keep. Ends with 1 if a hand-off failed, if a worker died, or if a worker kept memory, threads or descriptors.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import psutil

from kvroom.core.messages import Peer
from kvroom.wire.handshake import Handshake, LinkIdentity, Proof, Role
from kvroom_lab.allocator import ALLOCATOR
from serve.helpers import Process, look, post, running, save_tiny_model

from .mutations import mutate

SECRET = "the secret of the workers under test"
AT_ONCE = 40
MAX_GROWTH_KIB = 1024
SIZES = ("--page-tokens", "4", "--pages", "128", "--bootstrap-s", "15")


class Use(NamedTuple):
    """Resources of one worker."""

    resident_kib: int
    threads: int
    descriptors: int


class Pair:
    """A prefill and a decode worker, with requests that go to both."""

    def __init__(self, prefill: Process, decode: Process) -> None:
        self.workers = (prefill, decode)
        self._rooms = itertools.count(1)
        self._posts = ThreadPoolExecutor(2)
        self.served = 0

    def hand_over(self) -> None:
        """Serve one request. Raise if a worker does not answer 200, or if the text is wrong."""
        prefill = self.workers[0]
        body = {
            "text": "a prompt of some pages",
            "sampling_params": {"max_new_tokens": 8, "temperature": 0},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": int(prefill.ready.facts["bootstrap_port"]),
            "bootstrap_room": next(self._rooms),
        }
        answers = list(self._posts.map(lambda worker: post(worker.url, "/generate", body), self.workers))
        assert [answer.status for answer in answers] == [200, 200], answers
        self.served += 1

    def ports(self) -> list[tuple[str, int]]:
        """Return every address on which the workers listen."""
        return [
            (connection.laddr.ip if connection.laddr.ip != "0.0.0.0" else "127.0.0.1", connection.laddr.port)
            for worker in self.workers
            for connection in psutil.Process(worker.popen.pid).net_connections("tcp4")
            if connection.status == psutil.CONN_LISTEN
        ]

    def use(self) -> list[Use]:
        processes = [psutil.Process(worker.popen.pid) for worker in self.workers]
        return [Use(one.memory_info().rss // 1024, one.num_threads(), one.num_fds()) for one in processes]


def payloads(random: Random) -> Iterator[bytes]:
    """Yield what strangers send: noise, impossible lengths, mutated beginnings of each protocol in use."""
    hello = Handshake(Role.DIALLER, b"another secret", Peer("10.9.9.9:9", 5), lambda _: LinkIdentity(b"x")).take()
    proof = msgspec.msgpack.encode(Proof(bytes(32)))
    starts = (
        hello,
        hello + len(proof).to_bytes(4, "big") + proof,
        b"kvroom\x00\x01" + bytes(64),
        b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{}",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n",
        b"GET /rooms?oldest=1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    )
    while True:
        kind = random.randrange(len(starts) + 3)
        if kind < len(starts):
            yield mutate(random, starts[kind])[:4096]
        elif kind == len(starts):
            yield random.randbytes(random.randrange(1, 2000))
        elif kind == len(starts) + 1:
            yield random.randrange(1 << 32).to_bytes(4, "big") + random.randbytes(40)
        else:
            yield b""


def knock(where: list[tuple[str, int]], random: Random, texts: Iterator[bytes], count: int) -> int:
    """Open `count` connections, send one text on each, and reset them; return how many were made."""
    made = 0
    connections = []
    for _ in range(count):
        connection = socket.socket()
        connection.settimeout(5)
        try:
            connection.connect(random.choice(where))
            made += 1
            connection.sendall(next(texts))
        except OSError:
            pass  # refused, or reset while sending
        connections.append(connection)
    for connection in connections:
        # A reset leaves no TIME_WAIT, which a million times over would use up the client's ports.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if random.random() < 0.5:
            try:
                connection.shutdown(socket.SHUT_WR)
                connection.setblocking(False)
                connection.recv(4096)
            except OSError:
                pass  # no answer, which is correct for most texts
        connection.close()
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=1_000_000)
    parser.add_argument("--transport", default="tcp")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = ("--model", str(save_tiny_model(Path(folder, "tiny"))), "--transport", options.transport, *SIZES)
        with (
            running("prefill", *model, KVROOM_SECRET=SECRET, **ALLOCATOR) as prefill,
            running("decode", *model, KVROOM_SECRET=SECRET, **ALLOCATOR) as decode,
        ):
            for worker in (prefill, decode):
                threading.Thread(target=_read_log, args=(worker,), daemon=True).start()
            return _measure(Pair(prefill, decode), options.connections)


def _read_log(worker: Process) -> None:
    """Read a worker's log until the worker ends; with a full pipe it would block."""
    assert worker.popen.stderr is not None
    with open(os.dup(worker.popen.stderr.fileno()), "rb") as log:
        while log.read1():
            pass


def _measure(pair: Pair, connections: int) -> int:
    for _ in range(20):
        pair.hand_over()
    where = pair.ports()
    print(f"ports {sorted(port for _, port in where)}; at the start {pair.use()}", flush=True)
    _flood(pair, where, connections // 2)
    half = _settled(pair)
    print(f"at the half {half}, {pair.served} requests served", flush=True)
    _flood(pair, where, connections - connections // 2)
    end = _settled(pair)
    print(f"at the end  {end}, {pair.served} requests served", flush=True)
    growth = [Use(*map(operator.sub, after, before)) for before, after in zip(half, end, strict=True)]
    kept = [use for use in growth if use.resident_kib >= MAX_GROWTH_KIB or use.threads > 0 or use.descriptors > 0]
    if kept:
        print(f"KEPT: {kept}", flush=True)
    return int(bool(kept))


def _flood(pair: Pair, where: list[tuple[str, int]], connections: int) -> None:
    """Open this number of connections from two threads, and hand rooms over in between."""
    left = threading.Semaphore(connections // AT_ONCE)

    def work(seed: int) -> int:
        random = Random(seed)
        texts, made = payloads(random), 0
        while left.acquire(blocking=False):
            made += knock(where, random, texts, AT_ONCE)
        return made

    with ThreadPoolExecutor(2) as threads:
        tasks = [threads.submit(work, seed) for seed in range(2)]
        while not all(task.done() for task in tasks):
            pair.hand_over()
        print(f"{sum(task.result() for task in tasks)} connections made", flush=True)


def _settled(pair: Pair) -> list[Use]:
    """Return what the workers use once the strangers have gone, after a hand-off and with nothing in flight."""
    pair.hand_over()
    for worker in pair.workers:
        assert look(worker.url, "/rooms?idle_within_s=20").status == 200
    return min((pair.use() for _ in range(50) if not threading.Event().wait(0.5)), key=lambda uses: uses[0].descriptors)


if __name__ == "__main__":
    sys.exit(main())

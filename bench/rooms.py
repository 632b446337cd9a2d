"""Control plane: hand-off latency of a one-page room, and rooms per second with 64 rooms open at the same time.

Two processes on one machine: a prefill manager in a child, a decode manager here. The page is small (8 KiB), so that
the time is that of the room and not of the copy. Run: python bench/rooms.py [--transport auto] [--rooms 3000]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections import deque
from multiprocessing.connection import Connection

from kvroom import KVBootstrapServer, KVIdentity, KVManager, KVReceiver, KVSender
from kvroom_lab.pools import TestPool

OPEN = 64
PAGE_TOKENS = 16
TOKENS = list(range(PAGE_TOKENS))


def pool() -> TestPool:
    return TestPool(layers=2, pages=OPEN * 2, page_tokens=PAGE_TOKENS, heads=2, head_bytes=64)


def prefill(control: Connection, addr: str, transport: str) -> None:
    """Serve commands (open N rooms from number A on, at most W at the same time) until the parent sends None."""
    with KVManager((memory := pool()).layout, transport=transport, register_with=addr) as manager:
        control.send("ready")
        while (order := control.recv()) is not None:
            first, count, window = order
            waiting: deque[KVSender] = deque()
            for room in range(first, first + count):
                if len(waiting) >= window:
                    finish(waiting.popleft())
                sender = manager.sender(room, identity=KVIdentity.of(TOKENS))
                sender.send([room % OPEN], stop=PAGE_TOKENS, last=True, aux=b"t")
                waiting.append(sender)
            control.send("opened")
            while waiting:
                finish(waiting.popleft())
            control.send(manager.wait_idle(10))
    memory.close()


def finish(handle: KVSender | KVReceiver) -> None:
    handle.wait(60)
    handle.clear()


def receive(manager: KVManager, addr: str, room: int) -> KVReceiver:
    receiver = manager.receiver(addr, room, identity=KVIdentity.of(TOKENS))
    receiver.send_metadata([room % OPEN], tokens=PAGE_TOKENS)
    return receiver


def measure_latency(manager: KVManager, addr: str, control: Connection, first: int, count: int) -> list[float]:
    """Return the seconds from both sides being ready to Success on the decode side, for one room after the other."""
    control.send((first, count, count))
    assert control.recv() == "opened"
    taken = []
    for room in range(first, first + count):
        begun = time.perf_counter()
        receiver = receive(manager, addr, room)
        receiver.wait(60)
        taken.append(time.perf_counter() - begun)
        receiver.clear()
    assert control.recv() is True
    return taken


def measure_rate(manager: KVManager, addr: str, control: Connection, first: int, count: int) -> float:
    """Return rooms per second with `OPEN` rooms open at the same time on each side."""
    begun = time.perf_counter()
    control.send((first, count, OPEN))
    waiting: deque[KVReceiver] = deque()
    for room in range(first, first + count):
        if len(waiting) >= OPEN:
            finish(waiting.popleft())
        waiting.append(receive(manager, addr, room))
    while waiting:
        finish(waiting.popleft())
    rate = count / (time.perf_counter() - begun)
    assert control.recv() == "opened"
    assert control.recv() is True
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--rooms", type=int, default=3000)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with KVBootstrapServer() as directory:
        child = context.Process(target=prefill, args=(theirs, directory.address, options.transport), daemon=True)
        child.start()
        assert ours.recv() == "ready"
        with KVManager((memory := pool()).layout, transport=options.transport) as manager:
            measure_latency(manager, directory.address, ours, 0, 100)  # warm-up
            latencies = measure_latency(manager, directory.address, ours, 1000, 500)
            rates = [
                measure_rate(manager, directory.address, ours, 10_000 + i * options.rooms, options.rooms)
                for i in range(3)
            ]
            how = next(iter(manager.peers().values()))
            left = manager.audit()
        ours.send(None)
        child.join()
    memory.close()
    quantiles = statistics.quantiles(latencies, n=100)
    print(f"transport          {how}")
    print(f"hand-off latency   median {statistics.median(latencies) * 1e6:.0f} us, p99 {quantiles[98] * 1e6:.0f} us")
    print(f"rooms per second   median {statistics.median(rates):.0f} ({OPEN} at once, {options.rooms} rooms, 3 runs)")
    print(f"left over          {'nothing' if left.empty else left}")
    print(f"load average       {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

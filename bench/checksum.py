"""The cost of a checksum: rooms with a checksum against the same rooms without, in turns, small and large.

Two processes on one machine: a prefill manager in a child, a decode manager here.
Run: python bench/checksum.py [--transport auto]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from kvroom import KVBootstrapServer, KVIdentity, KVManager
from kvroom_lab.pools import TestPool

LAYERS, PAGE_TOKENS, HEADS, HEAD_BYTES = 16, 16, 8, 256
PROMPT = KVIdentity.of(range(PAGE_TOKENS))
PAGES = 64
PAIRS = 30


def pool() -> TestPool:
    """Yield a pool of 64 MiB: 64 pages of 1 MiB, each in blocks of 32 KiB."""
    return TestPool(layers=LAYERS, pages=PAGES, page_tokens=PAGE_TOKENS, heads=HEADS, head_bytes=HEAD_BYTES)


def prefill(control: Connection, addr: str, transport: str) -> None:
    """Send the pages of one room after the other until the parent sends None."""
    memory = pool()
    memory.fill(1)
    with KVManager(memory.layout, transport=transport, register_with=addr) as manager:
        control.send("ready")
        while (order := control.recv()) is not None:
            room, pages = order
            with manager.sender(room, identity=PROMPT) as sender:
                sender.send(range(pages), stop=pages * PAGE_TOKENS, last=True)
                control.send("sent")
                sender.wait(60)
    memory.close()


@contextmanager
def managers(transport: str) -> Iterator[tuple[KVManager, str, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    memory = pool()
    with KVBootstrapServer() as directory:
        child = context.Process(target=prefill, args=(theirs, directory.address, transport), daemon=True)
        child.start()
        assert ours.recv() == "ready"
        with KVManager(memory.layout, transport=transport) as manager:
            yield manager, directory.address, ours
        ours.send(None)
        child.join()
    memory.close()


def hand_over(manager: KVManager, addr: str, control: Connection, room: int, pages: int, checksum: bool) -> float:
    """Return the seconds from the moment when the prefill side is ready to Success on the decode side."""
    control.send((room, pages))
    assert control.recv() == "sent"
    begun = time.perf_counter()
    with manager.receiver(addr, room, identity=PROMPT) as receiver:
        receiver.send_metadata(range(pages), tokens=pages * PAGE_TOKENS, checksum=checksum)
        receiver.wait(60)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transport", default="auto")
    options = parser.parse_args()
    with managers(options.transport) as (manager, addr, control):
        room = 0
        for pages in (1, PAGES):
            taken: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(2 * PAIRS + 4):
                room += 1
                seconds = hand_over(manager, addr, control, room, pages, checksum := bool(turn % 2))
                if turn >= 4:  # the first runs are not measured
                    taken[checksum].append(seconds)
            without, with_one = statistics.median(taken[False]), statistics.median(taken[True])
            print(
                f"{pages:3} MiB room   without {without * 1e3:7.2f} ms   with {with_one * 1e3:7.2f} ms   "
                f"ratio {with_one / without:.2f}   (medians of {PAIRS} each)"
            )
        print(f"transport      {next(iter(manager.peers().values()))}")
    print(f"load average   {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

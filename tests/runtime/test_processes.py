"""A prefill process dies in the middle: its room ends immediately, pages come back on proof, nothing is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, RoomFailed
from kvroom_lab.pools import TestPool


def prefill(control: Connection, addr: str, transport: str) -> None:
    """Open the requested rooms and send one chunk of each, but never the last, until killed."""
    pool = TestPool()
    pool.fill(1)
    with KVManager(pool.layout, transport=transport, register_with=addr) as manager:
        control.send(pool.tokens([5], 2).tobytes())
        senders = []
        while True:
            sender = manager.sender(control.recv(), identity=PROMPT)
            sender.send([5], stop=2)
            senders.append(sender)


@contextlib.contextmanager
def child(addr: str, transport: str) -> Iterator[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(theirs, addr, transport), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


@pytest.mark.parametrize("transport", ["local", "tcp", "auto"])
def test_a_killed_prefill_ends_its_room_and_gives_the_pages_back(transport: str) -> None:
    events: queue.Queue[str] = queue.Queue()
    released: queue.Queue[tuple[int, ...]] = queue.Queue()
    pool = TestPool()
    with KVBootstrapServer() as directory, child(directory.address, transport) as (process, control):
        expected = control.recv()
        with KVManager(pool.layout, transport=transport, on_change=lambda: events.put("changed")) as manager:
            with manager.receiver(directory.address, 7, on_release=released.put, identity=PROMPT) as receiver:
                receiver.send_metadata([9], tokens=4)
                control.send(7)
                while receiver.poll().name != "Transferring":
                    events.get(timeout=20)
                process.kill()
                with pytest.raises(RoomFailed, match=r"the link to .* was lost"):
                    receiver.wait(20)
            assert released.get(timeout=20) == (9,)
            assert manager.wait_idle(20)
            assert manager.audit() == Audit()
        np.testing.assert_array_equal(pool.tokens([9], 2), np.frombuffer(expected, np.uint8).reshape(2, 2, 2, 2, 16))
    pool.close()

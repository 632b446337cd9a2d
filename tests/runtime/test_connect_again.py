"""A transport fails to connect to a linked peer: its rooms fail, later ones find it repaired, and the link stays."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, RoomFailed
from kvroom.errors import TransportError
from kvroom.runtime import peers
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool

WAIT_S = 20.0


class Short(MemoryTransport):
    """Fails to connect as long as `short` is set, as a transport without a free descriptor does."""

    def __init__(self, short: bool) -> None:
        super().__init__()
        self.short = short
        self.tries = 0

    def connect(self, description: bytes) -> int:
        self.tries += 1
        if self.short:
            raise TransportError(f"memory: {os.strerror(errno.EMFILE)}")
        return super().connect(description)


class Two:
    """A prefill and a decode manager, one of which cannot connect its transport at first."""

    def __init__(self, stack: contextlib.ExitStack, short: str) -> None:
        self.address = stack.enter_context(KVBootstrapServer()).address
        self.transports = [Short(short == side) for side in ("prefill", "decode")]
        self.short = self.transports[["prefill", "decode"].index(short)]
        managers = []
        for transport, directory in zip(self.transports, (self.address, None), strict=True):
            pool = TestPool()
            stack.callback(pool.close)
            managers.append(stack.enter_context(KVManager(pool.layout, transport=transport, register_with=directory)))
        self.prefill, self.decode = managers

    def let_time_pass(self) -> None:
        """Skip the time in which the side whose transport failed does not retry."""
        manager = self.prefill if self.short is self.transports[0] else self.decode
        (remote,) = manager.driver.peers.remotes.values()
        assert remote.again_s is not None
        remote.again_s = 0.0

    def hand_over(self, room: int) -> None:
        with (
            self.prefill.sender(room, identity=PROMPT) as sender,
            self.decode.receiver(self.address, room, identity=PROMPT) as receiver,
        ):
            receiver.send_metadata([1], tokens=4)
            sender.send([2], stop=4, last=True)
            receiver.wait(WAIT_S)
            sender.wait(WAIT_S)


@pytest.fixture(params=["prefill", "decode"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with contextlib.ExitStack() as stack:
        yield Two(stack, request.param)


@pytest.fixture(autouse=True)
def time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CONNECT_AGAIN_S", 3600)


def test_a_room_that_comes_later_makes_it_try_again(two: Two) -> None:
    for room in (1, 2):
        with pytest.raises(RoomFailed, match="Too many open files"):
            two.hand_over(room)
        two.let_time_pass()
    two.short.short = False
    for room in (3, 4):
        two.hand_over(room)
    assert two.decode.metrics().links_lost == 0
    assert two.short.tries == 3


def test_until_then_rooms_fail_without_another_try(two: Two) -> None:
    for room in range(10):
        with pytest.raises(RoomFailed, match="Too many open files"):
            two.hand_over(room)
    assert two.short.tries == 1

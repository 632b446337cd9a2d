"""The choice of the link among several connections: two real `Links` over a wire that reorders and breaks.

The wire stands in for TCP: it keeps the order of the bytes in one direction of one connection, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from link_helpers import SECRET, Got, Lost, Recorder, Up

from kvroom.core.messages import Peer, Progress
from kvroom.runtime.connection import Connection
from kvroom.runtime.link import Links
from kvroom.wire.handshake import Role

FIN, RESET = "fin", "reset"


class End(asyncio.Transport):
    """One end of a connection: what it writes waits in `outgoing` until the wire carries it to `other`."""

    other: End

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.outgoing: deque[bytes | str] = deque()
        self.open = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.open:
            self.outgoing.append(bytes(data))

    def close(self) -> None:
        self._shut(FIN)

    def abort(self) -> None:
        self._shut(RESET)

    def get_write_buffer_size(self) -> int:
        return 0

    def _shut(self, how: str) -> None:
        if self.open:
            self.open = False
            if how == RESET:
                self.outgoing.clear()
            self.outgoing.append(how)
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def break_(self) -> None:
        """Break the connection: this side notices now, the other one when the reset is delivered."""
        if self.open:
            self.open = False
            self.outgoing.clear()
            self.outgoing.append(RESET)
            self.connection.connection_lost(ConnectionResetError("broken by the test"))

    def carry_one(self) -> None:
        item, to = self.outgoing.popleft(), self.other
        if not to.open:
            return
        if isinstance(item, bytes):
            to.connection.data_received(item)
        elif item == FIN:
            to.connection.eof_received()
            to.close()
        else:
            to.open = False
            to.outgoing.clear()
            to.connection.connection_lost(ConnectionResetError("reset by the other side"))


@dataclass
class Wire:
    """Two managers and every connection that was ever made between them."""

    sides: tuple[Links, Links]
    recorders: tuple[Recorder, Recorder]
    pairs: list[tuple[End, End]] = field(default_factory=list)
    stalled: set[int] = field(default_factory=set)
    """Indices of the pairs whose bytes wait: TCP may be slow on one connection and not on another."""
    sent: int = 0

    def dial(self, dialler: int) -> None:
        """Dial as `Links.dial` does: only where no link is open."""
        if self.sides[1 - dialler].me in self.sides[dialler].peers:
            return
        dialled = self.sides[1 - dialler].me.address
        dialling = End(self.sides[dialler]._connection(Role.DIALLER, dialled))
        ends = dialling, End(self.sides[1 - dialler]._connection(Role.ACCEPTOR))
        ends[0].other, ends[1].other = ends[1], ends[0]
        self.pairs.append(ends if dialler == 0 else (ends[1], ends[0]))
        for end in ends:
            end.connection.connection_made(end)

    def lose(self, index: int, side: int) -> None:
        """Let one side lose a connection; the other notices later, if at all."""
        self.stalled.add(index)
        self.pairs[index][side].break_()

    async def carry(self, choice: int) -> bool:
        """Deliver the next item of one direction that has any; return False if nothing is in flight."""
        busy = self._busy()
        if busy:
            busy[choice % len(busy)].carry_one()
        await asyncio.sleep(0)  # let `connection_lost` and the coalesced writes happen
        await asyncio.sleep(0)
        return bool(busy) or bool(self._busy())

    def _busy(self) -> list[End]:
        moving = (pair for index, pair in enumerate(self.pairs) if index not in self.stalled)
        return [end for pair in moving for end in pair if end.outgoing]

    async def settle(self) -> None:
        while await self.carry(0):
            pass

    def greet(self, side: int) -> Any:
        """Send one message as soon as a link is up: the first message is the easiest to lose."""

        def react(event: Up | Lost | Got) -> None:
            if event[0] == "up":
                self.sent += 1
                assert self.sides[side].send(event[1], Progress(room=side, generation=0, tokens=self.sent))

        return react


async def play(incarnations: tuple[int, int], steps: list[tuple[str, int]]) -> Wire:
    recorders = Recorder(), Recorder()
    a, b = (
        Links(recorder, identity=b"id", secret=SECRET, incarnation=incarnation)
        for recorder, incarnation in zip(recorders, incarnations, strict=True)
    )
    a._me, b._me = Peer("a:1", incarnations[0]), Peer("b:1", incarnations[1])
    wire = Wire((a, b), recorders)
    for side in (0, 1):
        recorders[side].react = wire.greet(side)
    for what, choice in steps:
        if what == "dial":
            wire.dial(choice % 2)
        elif what == "carry":
            await wire.carry(choice)
        elif what == "settle":
            await wire.settle()
        elif what == "stall":
            wire.stalled ^= {choice // 2}
        elif what == "drop":
            wire.sides[choice % 2].drop(wire.sides[1 - choice % 2].me, "the test says so")
        elif wire.pairs:
            wire.lose(choice // 2 % len(wire.pairs), choice % 2)
    wire.stalled.clear()
    await wire.settle()
    return wire


def check_story(wire: Wire, side: int) -> None:
    """Check the order up, messages, lost, up, ...: no message outside a link, and no link reported twice."""
    open_ = False
    for event in wire.recorders[side].events:
        assert open_ == (event[0] != "up")
        open_ = event[0] != "lost"
    assert open_ == bool(wire.sides[side].peers)


kinds = st.sampled_from(["dial", "dial", "carry", "carry", "settle", "stall", "lose", "drop"])
steps = st.lists(st.tuples(kinds, st.integers(0, 7)), min_size=12, max_size=40)
calm_steps = st.lists(st.tuples(st.sampled_from(["dial", "carry", "carry"]), st.integers(0, 63)), max_size=40)
orders = st.sampled_from([(1, 2), (2, 1)])


@settings(max_examples=400, deadline=None)
@given(orders, steps)
def test_both_sides_always_agree_on_the_link(incarnations: tuple[int, int], steps: list[tuple[str, int]]) -> None:
    async def body() -> None:
        wire = await play(incarnations, steps)
        a, b = wire.sides
        assert bool(a.peers) == bool(b.peers)
        if a.peers:
            kept = a._links[b.me], b._links[a.me]
            assert kept in [(one.connection, other.connection) for one, other in wire.pairs]
        for side in (0, 1):
            check_story(wire, side)
        await a.close()
        await b.close()

    asyncio.run(body())


@settings(max_examples=300, deadline=None)
@given(orders, calm_steps)
def test_without_a_loss_every_dial_ends_in_one_link_and_no_word_is_lost(
    incarnations: tuple[int, int], steps: list[tuple[str, int]]
) -> None:
    async def body() -> None:
        wire = await play(incarnations, [("dial", 0), *steps])
        for side in (0, 1):
            kinds = [event[0] for event in wire.recorders[side].events]
            assert kinds == ["up", "got"]
        for links in wire.sides:
            await links.close()

    asyncio.run(body())

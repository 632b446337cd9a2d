"""The process of one rank: `python -m kvroom_lab.ranks.worker FD` carries out the calls that arrive on that socket.

A rank is a `KVManager` and a `RankPool`, made by `start` and ended by `stop`, so one process can be many ranks, one
after the other. Every call is a method of `Worker`; its arguments and its result are JSON.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from typing import Any

import msgspec

from kvroom import Audit, KVManager, KVPoll, KVReceiver, KVSender, Timeouts
from kvroom.core.identity import KVIdentity
from kvroom.errors import KVRoomError
from kvroom.plan.ranks import Place

from .cases import Case, SideName
from .channel import Channel, RankDied
from .pool import Held, RankPool
from .requests import Placed, place_to_receive, place_to_send


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a rank."""

    case: Case
    side: SideName
    place: Place
    transport: str
    transport_options: dict[str, Any] = {}
    directory: str
    timeouts: Timeouts
    checksum: bool = False
    shared: bool = False


class Ended(msgspec.Struct, frozen=True):
    """The end of a room on this rank: its bytes, or its failure. Only `status` is set if the room has not ended."""

    status: str
    nbytes: int = 0
    failure: str = ""
    aux: str = ""


class _Request(msgspec.Struct):
    handle: KVSender | KVReceiver
    tokens: int
    placed: Placed
    sent: int = 0
    releases: int = 0
    wiped: bool = False  # its pages are used for something else: none of its bytes may be in memory


class Worker:
    """One rank. Its public methods are the calls that a test can make."""

    def start(self, config: dict[str, Any]) -> str:
        """Make the pool and the manager; return the manager's address."""
        self._config = config_ = msgspec.convert(config, Start)
        case, side, place = config_.case, config_.side, config_.place
        self._side = case.side(side)
        self._requests: dict[int, _Request] = {}
        self._over: dict[int, _Request] = {}  # cleared, but still in memory
        self._changed = threading.Condition()
        self._stack = contextlib.ExitStack()
        self._pool = RankPool(case, side, place, shared=config_.shared)
        self._stack.callback(self._pool.close)
        self._manager = self._stack.enter_context(
            KVManager(
                self._pool.layout,
                parallel=self._side.parallel,
                place=place,
                transport=config_.transport,
                transport_options=config_.transport_options,
                trusted_fabric=True,  # all ranks are on this machine, for the time of a test
                register_with=config_.directory if side == "source" else None,
                timeouts=config_.timeouts,
                checksum=config_.checksum,
                on_change=self._notify,
            )
        )
        return self._manager.address

    def stop(self) -> None:
        """Close the manager and free the memory."""
        self._stack.close()

    def open(self, room: int, tokens: int, prefix: int) -> None:
        """Open this side of a room. A prefill rank also computes the request's KV."""
        identity = KVIdentity.of((room, tokens))
        if self._config.side == "source":
            placed = place_to_send(self._pool, self._side, self._config.place, tokens)
            self._pool.write(room, placed.held)
            handle: KVSender | KVReceiver = self._manager.sender(
                room, identity=identity, on_release=lambda _: self._released(room)
            )
        else:
            placed = place_to_receive(self._pool, tokens, prefix)
            handle = self._manager.receiver(
                self._config.directory, room, identity=identity, on_release=lambda _: self._released(room)
            )
        self._requests[room] = _Request(handle, tokens, placed)

    def offer(self, room: int) -> None:
        """Offer the pages. For decode ranks."""
        one = self._requests[room]
        assert isinstance(one.handle, KVReceiver)
        (step,) = one.placed.steps
        one.handle.send_metadata(
            step.pages, tokens=one.tokens, decode_prefix_len=step.start, windows=one.placed.windows
        )

    def send(self, room: int, steps: int = sys.maxsize) -> int:
        """Send the next steps, or all; return how many are left. For prefill ranks."""
        one = self._requests[room]
        assert isinstance(one.handle, KVSender)
        every = one.placed.steps
        for step in every[one.sent : one.sent + steps]:
            one.sent += 1
            last = one.sent == len(every)
            windows = one.placed.windows if last else {}
            aux = str(self._config.place).encode() if last else b""
            one.handle.send(step.pages, start=step.start, stop=step.stop, last=last, windows=windows, aux=aux)
        return len(every) - one.sent

    def abort(self, room: int, detail: str) -> None:
        self._requests[room].handle.abort(detail)

    def until(self, room: int, status: str, timeout_s: float) -> bool:
        """Wait until the room's handle has this status, or has ended; return False after the timeout."""
        handle = self._requests[room].handle
        with self._changed:
            return self._changed.wait_for(lambda: handle.poll().name in (status, "Failed", "Success"), timeout_s)

    def wait(self, room: int, timeout_s: float) -> Ended:
        """Wait for the end of the room; return how it ended, or its present status after the timeout."""
        handle = self._requests[room].handle
        try:
            done = handle.wait(timeout_s)
        except TimeoutError:
            return Ended(handle.poll().name)
        except KVRoomError as error:
            return Ended(handle.poll().name, failure=str(error))
        return Ended(handle.poll().name, nbytes=done.nbytes, aux=done.aux.decode())

    def clear(self, room: int) -> None:
        """Clear the handle. The request's bytes stay in the pool, to be checked."""
        self._requests[room].handle.clear()
        self._over[room] = self._requests.pop(room)

    def releases(self, room: int, timeout_s: float) -> int:
        """Wait for the first call of `on_release` for this room; return how often it was called."""
        one = self._requests.get(room) or self._over[room]
        with self._changed:
            self._changed.wait_for(lambda: one.releases > 0, timeout_s)
            return one.releases

    def wrong_bytes(self) -> list[str]:
        """Return what is wrong in the whole memory.

        A room that has not succeeded here may have any of its bytes in its pages until they are released; after that,
        none may arrive.
        """
        whole: dict[int, tuple[Held, ...]] = {}
        partly: dict[int, tuple[Held, ...]] = {}
        with self._changed:  # no room is released during the comparison
            for room, one in (self._over | self._requests).items():
                if not one.wiped:
                    sure = isinstance(one.handle, KVSender) or one.handle.poll() is KVPoll.Success
                    (whole if sure else partly)[room] = one.placed.held
            return self._pool.wrong_bytes(whole, partly)

    def audit(self, timeout_s: float) -> str:
        """Return what the manager still keeps when it is idle, as text; "" if it keeps nothing."""
        idle = self._manager.wait_idle(timeout_s)
        found = self._manager.audit()
        return "" if idle and found == Audit() else f"idle: {idle}, {found}"

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _released(self, room: int) -> None:
        """Use the released pages for something else immediately, unless they hold the result."""
        with self._changed:
            one = self._requests.get(room) or self._over[room]
            one.releases += 1
            # A room that fails after its offer publishes its failure before it releases the pages.
            if isinstance(one.handle, KVSender) or one.handle.poll() is KVPoll.Failed:
                self._pool.wipe(one.placed.held)
                one.wiped = True
            self._changed.notify_all()


def serve(channel: Channel) -> None:
    """Answer calls until the other end is closed."""
    worker = Worker()
    while True:
        try:
            method, arguments = channel.receive()
        except RankDied:
            return
        try:
            answer = ["ok", getattr(worker, method)(**arguments)]
        except (KVRoomError, TimeoutError, ValueError) as error:
            answer = [type(error).__name__, str(error)]
        channel.send(answer)


if __name__ == "__main__":
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))))

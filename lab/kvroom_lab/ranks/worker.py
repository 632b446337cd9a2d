"""The process of one rank: `python -m kvroom_lab.ranks.worker FD` does what it is asked over that socket.

A rank is a `KVManager` and a `RankPool`, made by `start` and ended by `stop`, so that one process can be many ranks,
one after the other. Everything that is asked is a method of `Worker`; its arguments and answers are JSON.
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
    """What a rank has to be."""

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
    """How a room ended on this rank: with so many bytes, or why not. `status` when it has not."""

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
    wiped: bool = False  # its pages are somebody else's: nothing of it may be in memory


class Worker:
    """One rank. Methods are what can be asked."""

    def start(self, config: dict[str, Any]) -> str:
        """Make the pool and the manager; its address."""
        self._config = config_ = msgspec.convert(config, Start)
        case, side, place = config_.case, config_.side, config_.place
        self._side = case.side(side)
        self._requests: dict[int, _Request] = {}
        self._over: dict[int, _Request] = {}  # cleared, and still in memory
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
        """End the manager and give the memory back."""
        self._stack.close()

    def open(self, room: int, tokens: int, prefix: int) -> None:
        """Open this side of a room; a prefill rank computes the request's KV, too."""
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
        """Offer the pages (decode ranks)."""
        one = self._requests[room]
        assert isinstance(one.handle, KVReceiver)
        (step,) = one.placed.steps
        one.handle.send_metadata(
            step.pages, tokens=one.tokens, decode_prefix_len=step.start, windows=one.placed.windows
        )

    def send(self, room: int, steps: int = sys.maxsize) -> int:
        """Send the next steps, all by default; how many are left (prefill ranks)."""
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
        """Wait until the room's handle says this status, or has ended."""
        handle = self._requests[room].handle
        with self._changed:
            return self._changed.wait_for(lambda: handle.poll().name in (status, "Failed", "Success"), timeout_s)

    def wait(self, room: int, timeout_s: float) -> Ended:
        """How the room ends within this time."""
        handle = self._requests[room].handle
        try:
            done = handle.wait(timeout_s)
        except TimeoutError:
            return Ended(handle.poll().name)
        except KVRoomError as error:
            return Ended(handle.poll().name, failure=str(error))
        return Ended(handle.poll().name, nbytes=done.nbytes, aux=done.aux.decode())

    def clear(self, room: int) -> None:
        """Clear the handle. What lies in the pool stays to be checked."""
        self._requests[room].handle.clear()
        self._over[room] = self._requests.pop(room)

    def releases(self, room: int, timeout_s: float) -> int:
        """How often `on_release` was called for this room: waits for the first time."""
        one = self._requests.get(room) or self._over[room]
        with self._changed:
            self._changed.wait_for(lambda: one.releases > 0, timeout_s)
            return one.releases

    def faults(self) -> list[str]:
        """What is wrong in all memory. A room that has not succeeded here may have any bytes in its pages, until they
        are released: from then on nothing of it may come.
        """
        whole: dict[int, tuple[Held, ...]] = {}
        partly: dict[int, tuple[Held, ...]] = {}
        with self._changed:  # nothing is released meanwhile
            for room, one in (self._over | self._requests).items():
                if not one.wiped:
                    sure = isinstance(one.handle, KVSender) or one.handle.poll() is KVPoll.Success
                    (whole if sure else partly)[room] = one.placed.held
            return self._pool.faults(whole, partly)

    def audit(self, timeout_s: float) -> str:
        """What the manager still keeps when it is idle, in words; empty if nothing."""
        idle = self._manager.wait_idle(timeout_s)
        found = self._manager.audit()
        return "" if idle and found == Audit() else f"idle: {idle}, {found}"

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _released(self, room: int) -> None:
        """The pages are ours again: use them for something else at once, unless they hold what was asked for."""
        with self._changed:
            one = self._requests.get(room) or self._over[room]
            one.releases += 1
            # A room that fails after its offer says so before it lets go of the pages.
            if isinstance(one.handle, KVSender) or one.handle.poll() is KVPoll.Failed:
                self._pool.wipe(one.placed.held)
                one.wiped = True
            self._changed.notify_all()


def serve(channel: Channel) -> None:
    """Answer until nobody asks any more."""
    worker = Worker()
    while True:
        try:
            method, arguments = channel.hear()
        except RankDied:
            return
        try:
            answer = ["ok", getattr(worker, method)(**arguments)]
        except (KVRoomError, TimeoutError, ValueError) as error:
            answer = [type(error).__name__, str(error)]
        channel.say(answer)


if __name__ == "__main__":
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))))

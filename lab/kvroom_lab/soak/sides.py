"""The two engines of a soak: their actions for a room of each kind, as one small script per room.

A script is a generator. It yields where it waits, and is resumed after every change in the manager. It ends when its
room has ended and was cleared, and its pages are back in the pool.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence

from kvroom.core.phases import KVPoll
from kvroom.core.settings import Timeouts
from kvroom.errors import KVRoomError, RoomInUse
from kvroom.runtime.handles import Handle, KVReceiver, KVSender
from kvroom.runtime.manager import KVManager
from kvroom.wire.address import parse_address

from .faults import BreakingTransport, cut_connections
from .mix import PAGE_TOKENS, End, Kind, Request
from .pool import SoakPool

Script = Generator[None, None, None]
Room = Generator[None, None, bool]

TIMEOUTS = Timeouts(bootstrap_s=5, waiting_s=30, stall_s=30, drain_s=5)
_EXAMPLES = 20
_ENDED = (KVPoll.Failed, KVPoll.Success)
_MOVING = (KVPoll.Transferring, *_ENDED)
# The other side may notice first and break the connection before this side does: then a failed transfer reports it.
_LINK_LOST = re.compile(r"\blink\b|was fenced|the connection to \S+ failed")
_CUT = "the other side of this room was lost when its link was cut"


class Side(ABC):
    """One engine: its manager, its pool, and a tally of how its rooms ended."""

    name: str

    def __init__(self, manager: KVManager, pool: SoakPool) -> None:
        self.manager = manager
        self.pool = pool
        self.opened = 0
        self.succeeded = 0
        self.failed = 0
        self.unexpected = 0
        self.excused = 0
        self.examples: list[str] = []
        # True from a room whose link is to be cut until the meeting after it: only in that time may a link be lost.
        self._cutting = False
        self._open: set[Handle] = set()
        self._waves = 0  # times that all rooms were given up because of a cut link

    def script(self, request: Request) -> Script:
        """Play this engine's part in a room of that kind."""
        kind = request.kind
        if self.expected(kind) is End.NONE:
            return
        if kind is Kind.BEFORE_INIT:
            yield from self._before_init(request)
            return
        self._cutting = self._cutting or kind is Kind.LINK_CUT
        waves = self._waves
        yield from self._room(request)
        if kind is Kind.AGAIN_AT_ONCE:
            yield from _until(lambda: self.pool.free >= request.pages)
            if waves == self._waves:  # otherwise the other side has given it up
                yield from self._room(again(request))

    def meet(self, request: Request) -> Script:
        """Wait for the other side, without a limit: its earlier messages have arrived by then."""
        while not (yield from self._room(request)):
            pass
        self._cutting = False

    @abstractmethod
    def _room(self, request: Request) -> Room:
        """Open a room, act, wait for its end and clear it; return whether it succeeded."""

    @abstractmethod
    def _no_room(self) -> Handle:
        """Return a handle without a number."""

    @abstractmethod
    def expected(self, kind: Kind) -> End:
        """Return the end that such a room must have on this side."""

    def note(self, request: Request, handle: Handle) -> None:
        """Count how a room has ended.

        A room that was lost with its link takes all others with it, as with a router that reports a failure to both
        sides: either side may not know yet which rooms the other has lost.
        """
        failure = _failure(handle)
        if failure is None:
            self.succeeded += 1
        else:
            self.failed += 1
        lost = failure is not None and self._cutting and _LINK_LOST.search(failure) is not None
        if lost:
            self._waves += 1
            for other in self._open:
                other.abort(_CUT)
        expected = self.expected(request.kind)
        if expected is End.EITHER or expected is (End.SUCCESS if failure is None else End.FAILURE):
            return
        if lost:
            self.excused += 1
        else:
            self.surprise(request, failure or "it succeeded")

    def surprise(self, request: Request, what: str) -> None:
        """Count an end that is not allowed.

        The example leaves out the room number, which the search for leftovers would find.
        """
        self.unexpected += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{request.kind.title}: {what.partition(': ')[2] or what}")

    def _refused(self, request: Request, second: Handle) -> Script:
        """Check that a second handle for an open number is refused, and that the first one is not affected."""
        yield from _until(lambda: second.poll() in _ENDED)
        try:
            second.failure_exception()
        except RoomInUse:
            pass
        except KVRoomError as error:
            self.surprise(request, f"refused with another error: {error}")
        else:
            self.surprise(request, "it was opened twice")
        second.clear()
        yield from _until(lambda: second.released)

    def _before_init(self, request: Request) -> Script:
        self.opened += 1
        handle = self._no_room()
        handle.abort()
        yield from _until(lambda: handle.poll() in _ENDED)
        self.note(request, handle)
        handle.clear()


class SourceSide(Side):
    """A prefill engine. `transport` is the manager's."""

    name = "source"

    def __init__(self, manager: KVManager, pool: SoakPool, transport: BreakingTransport) -> None:
        super().__init__(manager, pool)
        self._transport = transport
        self._port = parse_address(manager.address).port

    def expected(self, kind: Kind) -> End:
        return kind.source

    def _no_room(self) -> Handle:
        return self.manager.sender()

    def _room(self, request: Request) -> Room:
        pages = self.pool.take(request.pages)
        self.pool.write(pages, request.stamp)
        self.opened += 1
        sender = self.manager.sender(request.number, identity=request.identity)
        self._open.add(sender)
        yield from self._act(request, sender, pages)
        while sender.poll() not in _ENDED:
            yield
        self._open.discard(sender)
        self.note(request, sender)
        sender.clear()
        while not sender.released:
            yield
        self._transport.recover(pages)
        self.pool.give(pages)
        return sender.poll() is KVPoll.Success

    def _act(self, request: Request, sender: KVSender, pages: Sequence[int]) -> Script:
        """Do everything between opening the room and waiting for its end."""
        kind = request.kind
        if kind is Kind.AFTER_METADATA:
            sender.abort()
        elif kind is Kind.SOURCE_ABORTS_QUEUED:
            self._send(request, sender, pages)
            sender.abort()
            patience = time.monotonic() + TIMEOUTS.bootstrap_s
            yield from _until(lambda: sender.answered or time.monotonic() > patience)
        elif kind in (Kind.SOURCE_ABORTS, Kind.SOURCE_CLEARS, Kind.LINK_CUT):
            self._send_first(request, sender, pages)
            yield from _until(lambda: sender.poll() in _MOVING)
            self._delay_rest(request, pages)
            self._break_off(request, sender, pages)
        elif kind in (Kind.SINK_ABORTS, Kind.AGAIN_AT_ONCE):
            self._send_first(request, sender, pages)
        else:
            if kind is Kind.TRANSFER_ERROR:
                self._transport.spoiled.update(pages)
            if kind is Kind.DUPLICATE:
                yield from self._refused(request, self.manager.sender(request.number, identity=request.identity))
            if kind in (Kind.SINK_ABORTS_RACING, Kind.SINK_CLEARS):
                self._delay_rest(request, pages)
            self._send(request, sender, pages)

    def _break_off(self, request: Request, sender: KVSender, pages: Sequence[int]) -> None:
        """End the room, or cut its link, while the second chunk is in flight."""
        if sender.poll() in _ENDED:
            return
        if request.kind is Kind.LINK_CUT:
            cut_connections(self._port)
        self._send_rest(request, sender, pages)
        if request.kind is Kind.SOURCE_ABORTS:
            sender.abort()
        elif request.kind is Kind.SOURCE_CLEARS:
            sender.clear()

    def _delay_rest(self, request: Request, pages: Sequence[int]) -> None:
        """Delay the second chunk, so that it is still in flight when one side gives up."""
        self._transport.delay(pages[request.first // PAGE_TOKENS], request.first % PAGE_TOKENS)

    def _send(self, request: Request, sender: KVSender, pages: Sequence[int]) -> None:
        if request.first < request.tokens:
            self._send_first(request, sender, pages)
        self._send_rest(request, sender, pages)

    def _send_first(self, request: Request, sender: KVSender, pages: Sequence[int]) -> None:
        sender.send(pages[: -(-request.first // PAGE_TOKENS)], stop=request.first)

    def _send_rest(self, request: Request, sender: KVSender, pages: Sequence[int]) -> None:
        begun = request.first if request.first < request.tokens else 0
        sender.send(pages[begun // PAGE_TOKENS :], stop=request.tokens, last=True, aux=request.stamp.to_bytes(8, "big"))


class SinkSide(Side):
    """A decode engine. It finds prefill ranks through the directory at `bootstrap_addr`."""

    name = "sink"

    def __init__(self, manager: KVManager, pool: SoakPool, bootstrap_addr: str) -> None:
        super().__init__(manager, pool)
        self._bootstrap_addr = bootstrap_addr

    def expected(self, kind: Kind) -> End:
        return kind.sink

    def _no_room(self) -> Handle:
        return self.manager.receiver(self._bootstrap_addr)

    def _room(self, request: Request) -> Room:
        first = request.prefix // PAGE_TOKENS
        pages = self.pool.take(request.pages - first if request.prefix < request.tokens else 0)
        self.opened += 1
        receiver = self.manager.receiver(self._bootstrap_addr, request.number, identity=request.identity)
        self._open.add(receiver)
        yield from self._act(request, receiver, pages)
        while receiver.poll() not in _ENDED:
            yield
        self._open.discard(receiver)
        self.note(request, receiver)
        succeeded = receiver.poll() is KVPoll.Success
        if succeeded:
            self._check(request, receiver.aux, pages)
        receiver.clear()
        while not receiver.released:
            yield
        self.pool.give(pages)
        return succeeded

    def _check(self, request: Request, aux: bytes, pages: Sequence[int]) -> None:
        """Check the bytes against the room that the source's aux message names.

        That must be this room, or the other use of its number.
        """
        stamp, stamps = int.from_bytes(aux, "big"), [request.stamp]
        if request.kind in (Kind.AGAIN_AT_ONCE, Kind.AGAIN):  # either use may have met either one of the other side
            stamps.append(again(request).stamp)
        if stamp not in stamps:
            self.surprise(request, "another room's metadata came with it")
        self.pool.check(pages, stamp, request.prefix, request.tokens)

    def _act(self, request: Request, receiver: KVReceiver, pages: Sequence[int]) -> Script:
        """Do everything between opening the room and waiting for its end."""
        kind = request.kind
        if kind is Kind.SINK_DECLINES:
            receiver.abort()
            return
        if kind is Kind.DUPLICATE:
            yield from self._refused(
                request, self.manager.receiver(self._bootstrap_addr, request.number, identity=request.identity)
            )
        receiver.send_metadata(pages, tokens=request.tokens, decode_prefix_len=request.prefix)
        if kind is Kind.AFTER_METADATA:
            receiver.abort()
        elif kind in (Kind.SINK_ABORTS, Kind.SINK_ABORTS_RACING, Kind.AGAIN_AT_ONCE, Kind.SINK_CLEARS):
            yield from _until(lambda: receiver.poll() in _MOVING)
            if kind is Kind.SINK_CLEARS:
                receiver.clear()
            else:
                receiver.abort()


def again(request: Request) -> Request:
    """Return a second use of the number, with other bytes. It has no fault, but the number may not be free yet."""
    return request._replace(stamp=request.stamp ^ 0x5555555555555555, kind=Kind.AGAIN)


def _until(condition: Callable[[], bool]) -> Script:
    while not condition():
        yield


def _failure(handle: Handle) -> str | None:
    try:
        handle.failure_exception()
    except KVRoomError as error:
        return str(error)
    return None

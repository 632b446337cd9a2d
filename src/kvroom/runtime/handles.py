"""What an engine holds of a room: `KVSender` on the prefill side, `KVReceiver` on the decode side.

A handle only posts and reads. Every call returns at once and may come from any thread; `poll` is one attribute read.
The room itself belongs to the manager's loop thread, which writes what it has to tell into the handle. `clear()` may
be called in any phase, twice, and before a room number is assigned; leaving the handle's `with` block calls it.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import NamedTuple, TypeVar

from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import Failure
from kvroom.core.phases import SUCCEEDED, TERMINAL, KVPoll, Phase
from kvroom.core.room import Room
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.dialling.allowed import AllowList
from kvroom.errors import (
    AddressNotAllowed,
    ConfigurationError,
    KVRoomError,
    LimitExceeded,
    LocalRoomError,
    PlanError,
    RoomFailed,
    RoomInUse,
)
from kvroom.plan.page_runs import Pages
from kvroom.wire.address import parse_address

from .arguments import COUNT_END, as_aux, as_count, as_flag, as_pages, as_windows
from .causes import cause_of
from .checksum import unreadable
from .driver import Driver
from .logs import log_failure, room_log
from .page_lists import check_chunk
from .sources import Sources

logger = logging.getLogger(__name__)
HandleT = TypeVar("HandleT", bound="Handle")
OnRelease = Callable[[tuple[int, ...]], None]
OnChange = Callable[[], None]
ROOM_NUMBERS = COUNT_END


def check_directory(bootstrap_addr: str, allowed: AllowList) -> None:
    """Raise `LocalRoomError` for what is no address, `AddressNotAllowed` for one that is not on the list."""
    if not isinstance(bootstrap_addr, str):
        raise LocalRoomError(f"bootstrap_addr is {bootstrap_addr!r}: give the directory's address, host:port")
    try:
        allowed.check(parse_address(bootstrap_addr))
    except ConfigurationError as error:
        raise LocalRoomError(f"bootstrap_addr: {error}") from None


class HandOff(NamedTuple):
    """A hand-off that succeeded."""

    tokens: int  # of the request's prompt, those that the decode side had already included
    nbytes: int  # moved
    aux: bytes  # what the prefill engine said with its last chunk (sink) or gave us (source)
    transport: str  # which moved the bytes, and why the source chose it; empty if there were none to move
    latency_s: float  # from both sides being ready to the last byte, on the source's clock
    compared: tuple[str, ...]  # the fields of the request's identity that both sides stated, and that are equal


class Handle(ABC):
    """What both sides share."""

    def __init__(
        self,
        driver: Driver,
        room: Room,
        on_release: OnRelease | None,
        *,
        on_change: OnChange | None,
        identity: KVIdentity | None,
    ) -> None:
        room.listener = self
        self._identity: KVIdentity | None = None
        self._driver = driver
        self._room = room
        self._on_release = on_release
        self._on_change = on_change
        self._status = KVPoll.Bootstrapping
        self._ended: Future[None] = Future()
        self._result: HandOff | None = None
        self._refusal: KVRoomError | None = None
        self._failure: Failure | None = None
        self._told_phase = Phase.NEW  # the last one in the log
        self.bootstrap_room: int | None = None
        self.released = False
        """Nobody touches pages for this room any more, now or ever. True before `on_release` is called."""
        if identity is not None:
            self.identify(identity)

    # -- for the engine -------------------------------------------------------------------------------------------

    def init(self, bootstrap_room: int) -> None:
        """Assign the room number. `LocalRoomError` for a second one, or one outside [0, 2**63)."""
        if self.bootstrap_room is not None:
            raise LocalRoomError(f"room {self.bootstrap_room}: a handle takes one number, {bootstrap_room} came second")
        self.bootstrap_room = bootstrap_room = as_count(bootstrap_room, "bootstrap_room")
        if not self._post(self._open):
            self.bootstrap_room = None
            raise LocalRoomError(f"room {bootstrap_room} cannot be opened: this manager is closed")

    def identify(self, identity: KVIdentity) -> None:
        """State which request this side has, before pages are offered or sent.

        The room compares what both sides state as soon as it can. If they differ, it fails on both sides with one
        sentence, and nothing is written. A second call with the same identity does nothing. Raises `LocalRoomError` for
        another one, or for one without tokens; the first one stands.
        """
        if not isinstance(identity, KVIdentity) or not identity.travels:
            raise LocalRoomError(
                f"the identity of room {self.bootstrap_room} is {identity!r}: give KVIdentity.of(token_ids)"
            )
        if self._identity == identity:
            return
        if self._identity is not None:
            raise LocalRoomError(f"room {self.bootstrap_room}: another identity was stated; a room has one request")
        self._identity = identity
        self._post(lambda: self._driver.feed(self._room, asked.Identify(identity=identity)))

    def poll(self) -> KVPoll:
        """Where the room stands."""
        return self._status

    def abort(self, detail: str = "aborted by the engine") -> None:
        """End the room; the other side gets this cause. Nothing happens if it has ended already."""
        self._post(lambda: self._driver.feed(self._room, asked.GiveUp(detail=str(detail))))

    def clear(self) -> None:
        """Let the room go, whatever its phase. Pages still held come back through `on_release`, once they are free."""
        self._post(lambda: self._driver.feed(self._room, asked.Clear()))

    def failure_exception(self) -> None:
        """Raise why the room failed: `RoomFailed`, `RoomInUse` or `LimitExceeded`. Returns if it has not failed."""
        if self._refusal is not None:
            raise self._refusal
        if self._status is KVPoll.Failed and self._failure is not None:
            raise RoomFailed(self._failure.sentence(self.bootstrap_room))

    def wait(self, timeout_s: float | None = None) -> HandOff:
        """Block until the room has ended, and return its result or raise why it failed.

        Return at once when `poll()` says `Success` or `Failed`, also with a `timeout_s` of 0. `TimeoutError` leaves the
        room as it is.
        """
        if self._status not in (KVPoll.Failed, KVPoll.Success):  # these are published after the result
            try:
                self._ended.result(timeout_s)
            except FutureTimeoutError:
                raise TimeoutError(f"room {self.bootstrap_room} is {self._status.name} after {timeout_s} s") from None
        return self._outcome()

    def __await__(self) -> Generator[object, None, HandOff]:
        """Wait in any event loop. Cancelling the waiter leaves the room as it is."""
        yield from asyncio.shield(asyncio.wrap_future(self._ended)).__await__()
        return self._outcome()

    def __enter__(self: HandleT) -> HandleT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(f"the engine raised {type(error).__name__}: {error}")
        self.clear()

    # -- for the driver, in its thread ----------------------------------------------------------------------------

    def update_status(self, status: KVPoll) -> None:
        """Publish a status. It has no other effect: cleaning happens in `clear()`."""
        self._status = status

    def update(self, room: Room) -> None:
        """Publish what changed in the room."""
        self._failure = room.failure
        if room.phase in TERMINAL and room.failure is None and self._result is None:
            self._result = done = self._hand_off()
            self._driver.hand_offs[room.side].note(done.latency_s, done.nbytes)
        if logger.isEnabledFor(logging.DEBUG) and room.phase is not self._told_phase:
            self._told_phase = room.phase
            room_log(logger, room).debug("room %s is %s", self.bootstrap_room, room.phase.name)
        self.update_status(room.status)
        if room.status in (KVPoll.Failed, KVPoll.Success) and not self._ended.done():
            if room.failure is not None:
                log_failure(logger, room, self.bootstrap_room)
            self._ended.set_result(None)
        if self._on_change is not None:
            _call_engine(self._on_change, where="on_change")

    def release(self, pages: tuple[int, ...]) -> None:
        """The room has let its pages go."""
        self.released = True
        if self._on_release is not None:
            _call_engine(self._on_release, pages, where=f"on_release of room {self.bootstrap_room}")

    def _open(self) -> None:
        room = self._room
        if room.phase is not Phase.NEW:
            return  # aborted or cleared before it had a number
        assert self.bootstrap_room is not None  # init has set it
        try:
            self._driver.open(room, self.bootstrap_room, self._generation())
            if logger.isEnabledFor(logging.DEBUG):
                room_log(logger, room).debug("room %s is open", self.bootstrap_room)
        except (RoomInUse, LimitExceeded) as error:
            self._refusal = error
            self._driver.feed(room, asked.GiveUp(cause=cause_of(error), detail=str(error)))

    def _post(self, call: Callable[[], None]) -> bool:
        return self._driver.loop.post(call)

    def _generation(self) -> int | None:
        """Return what the room brings along when it is admitted: a sink mints its own, a source will be told it."""
        return None

    @abstractmethod
    def _hand_off(self) -> HandOff:
        """The result of a room that has just succeeded."""

    def _check_identified(self) -> None:
        if self._identity is None:
            raise LocalRoomError(
                f"room {self.bootstrap_room}: state which request it is before its pages are used: "
                f"identity=KVIdentity.of(token_ids) when the room is opened, or identify(...)"
            )

    def _compared(self) -> tuple[str, ...]:
        """The names of the fields in which both sides were found equal, of a room that has succeeded."""
        ours, theirs = self._room.identity, self._room.peer_identity
        return () if ours is None or theirs is None else ours.shared(theirs)

    def _outcome(self) -> HandOff:
        self.failure_exception()
        assert self._result is not None  # ended, and not failed
        return self._result


class KVSender(Handle):
    """The prefill side of one room. Chunks may be sent before the decode side has offered pages: they wait."""

    def __init__(
        self,
        driver: Driver,
        on_release: OnRelease | None,
        *,
        on_change: OnChange | None = None,
        identity: KVIdentity | None = None,
    ) -> None:
        self._source = Source(driver.table.timeouts)
        self._decode_prefix_len: int | None = None
        self._answered = False
        super().__init__(driver, self._source, on_release, on_change=on_change, identity=identity)
        self._position = 0
        self._last = False
        self._stop_parting: Callable[[], None] | None = None

    def send(
        self,
        pages: Pages,
        *,
        stop: int,
        start: int | None = None,
        last: bool = False,
        aux: bytes | bytearray | memoryview = b"",
        windows: Mapping[str, Pages] | None = None,
    ) -> None:
        """The KV of tokens [start, stop) is computed and lies in `pages`: hand it over.

        `start` is the previous stop (0 at first) if it is not given; a rank that has only some of the tokens (context
        parallel) gives it. `pages[0]` is the page that holds token `start`, so a page that a chunk filled only in part
        comes again with the next. `last` says that nothing follows: its `stop` is the request's length, `aux` (at most
        1 MiB) travels with it, and `windows` has the pages of every further group of the layout, which hold tokens
        [layout.window_start(group, stop), stop). The pages must stay unchanged until `on_release`. Raises
        `LocalRoomError` or `PlanError`, and sends nothing.
        """
        if self.bootstrap_room is None or self._last:
            reason = "the last chunk was sent already" if self._last else "call init first"
            raise LocalRoomError(f"room {self.bootstrap_room}: nothing can be sent, {reason}")
        self._check_identified()
        stop, last = as_count(stop, "stop"), as_flag(last, "last")
        begin = self._position if start is None else as_count(start, "start")
        if not self._position <= begin <= stop:
            raise LocalRoomError(
                f"room {self.bootstrap_room}: tokens [{begin}, {stop}) cannot be sent after {self._position}"
            )
        chunk = asked.SendPages(
            pages=as_pages(pages), stop=stop, last=last, aux=as_aux(aux), start=begin, windows=as_windows(windows)
        )
        check_chunk(self._driver.layout, chunk)
        self._position, self._last = stop, last
        self._post(lambda: self._driver.feed(self._room, chunk))

    @property
    def decode_prefix_len(self) -> int | None:
        """Tokens that every decode rank has already; None until their offers are here."""
        return self._decode_prefix_len

    @property
    def answered(self) -> bool:
        """Whether every decode rank that is known of was heard: it offered pages, or was told that the room failed."""
        return self._answered

    def abort_and_linger(self, detail: str) -> None:
        """End the room with this cause if it has not ended, and let it go when the decode side can know why.

        For an engine that is done with a request before its decode worker came: the room stays, without pages, until
        every decode rank that is known of was told, `Timeouts.bootstrap_s` at most. A room that succeeded goes at once.
        """

        def begin() -> None:
            if self.answered or self._refusal is not None or self._source.phase in SUCCEEDED:
                self.clear()
            elif self._stop_parting is None:
                self._stop_parting = self._driver.loop.call_later(self._source.timeouts.bootstrap_s, self.clear)

        self.abort(detail)
        self._post(begin)

    def update(self, room: Room) -> None:
        self._decode_prefix_len, self._answered = self._source.decode_prefix_len, self._source.answered
        super().update(room)
        if self._stop_parting is not None and self.answered:
            self._stop_parting()
            self.clear()

    def _hand_off(self) -> HandOff:
        source = self._source
        how = ", ".join(source.transports)
        return HandOff(
            source.position, source.nbytes, source.chunks[-1].aux, how, source.took_s, compared=self._compared()
        )


class KVReceiver(Handle):
    """The decode side of one room."""

    def __init__(
        self,
        driver: Driver,
        bootstrap_addr: str,
        on_release: OnRelease | None,
        *,
        sources: Sources,
        checksum: bool,
        on_change: OnChange | None = None,
        identity: KVIdentity | None = None,
    ) -> None:
        self._sink = Sink(driver.table.timeouts, bootstrap_addr=bootstrap_addr)
        self._sources, self._checksum = sources, checksum
        self._aux = b""
        super().__init__(driver, self._sink, on_release, on_change=on_change, identity=identity)
        self.bootstrap_addr = bootstrap_addr
        self._offered = False

    def send_metadata(
        self,
        pages: Pages,
        *,
        tokens: int,
        decode_prefix_len: int = 0,
        stop: int | None = None,
        windows: Mapping[str, Pages] | None = None,
        checksum: bool | None = None,
    ) -> None:
        """Offer pages for tokens [decode_prefix_len, stop) of a request of `tokens` tokens; once.

        `stop` is `tokens` if it is not given: a rank that keeps only a stretch of the request gives it.
        `pages[0]` is the page that holds token `decode_prefix_len`; page borders lie at multiples of the page size,
        counted from token 0. `windows` has, for each further group that is to be moved, the pages that hold tokens
        [layout.window_start(group, tokens), tokens). From now until `on_release` all these pages may be written and
        must not be reused. `checksum`: succeed only if XXH3 over exactly these bytes is the same on both sides (None:
        as the manager was told); it costs a read of the bytes on each side, and a round trip. Raises
        `LocalRoomError`, `PlanError` or `ConfigurationError`, and offers nothing.
        """
        if self.bootstrap_room is None or self._offered:
            reason = "pages were offered already" if self._offered else "call init first"
            raise LocalRoomError(f"room {self.bootstrap_room}: no pages can be offered, {reason}")
        self._check_identified()
        tokens = as_count(tokens, "tokens")
        decode_prefix_len = as_count(decode_prefix_len, "decode_prefix_len")
        end = tokens if stop is None else as_count(stop, "stop")
        if not 0 <= decode_prefix_len <= end <= tokens:
            raise PlanError(
                f"decode_prefix_len is {decode_prefix_len}, stop {end} and tokens {tokens}: "
                f"give 0 <= prefix <= stop <= tokens"
            )
        checked = self._checksum if checksum is None else as_flag(checksum, "checksum")
        offer = asked.OfferPages(
            pages=as_pages(pages),
            start=decode_prefix_len,
            stop=end,
            nbytes=0,
            grant=b"",
            checksum=checked,
            tokens=tokens if end < tokens else None,
            windows=as_windows(windows),
        )
        extents = self._driver.extents(offer)
        if checked and (error := unreadable(self._driver.layout)) is not None:
            raise ConfigurationError(error)
        self._offered = True
        self._post(lambda: self._driver.offer(self._room, offer, extents))

    @property
    def aux(self) -> bytes:
        """What the prefill engine said with its last chunk; empty before success."""
        return self._aux

    def failure_exception(self) -> None:
        """Raise why the room failed, as on the prefill side; `AddressNotAllowed` if its directory may not be asked."""
        failure = self._failure
        if self._status is KVPoll.Failed and failure is not None and failure.cause is Cause.NOT_ALLOWED:
            raise AddressNotAllowed(failure.sentence(self.bootstrap_room))
        super().failure_exception()

    def _open(self) -> None:
        super()._open()
        if self._room.number is not None:
            self._sources.find(self._sink, self.bootstrap_addr)
        elif isinstance(self._refusal, LimitExceeded) and self._failure is not None and self.bootstrap_room is not None:
            self._sources.turn_away(self.bootstrap_addr, self.bootstrap_room, self._failure)

    def update(self, room: Room) -> None:
        if room.failure is not None and not self._ended.done():
            self._sources.doubt(self.bootstrap_addr, room.failure)
        self._aux = self._sink.aux
        super().update(room)

    def _generation(self) -> int | None:
        return self._sources.new_generation()

    def _hand_off(self) -> HandOff:
        sink = self._sink
        assert sink.offer is not None  # it has landed
        how = ", ".join(sink.transports)
        return HandOff(sink.offer.stop, sink.nbytes, sink.aux, how, sink.took_s, compared=self._compared())


def _call_engine(callback: Callable[..., None], *arguments: object, where: str) -> None:
    """Call back into the engine, in the loop's thread.

    What the callback raises is a fault of the engine and concerns nobody else: it is logged with `where`, and the rooms
    go on. A room whose `on_release` raised has released its pages all the same, as its handle says.
    """
    try:
        callback(*arguments)
    except Exception:  # the driver's supervisor, for code that is not ours
        logger.exception("the engine's %s raised; the rooms of this manager go on", where)

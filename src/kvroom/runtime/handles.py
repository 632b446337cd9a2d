"""The engine's handles of a room: `KVSender` on the prefill side, `KVReceiver` on the decode side.

A handle only posts calls and reads published state. Every call but `wait` returns immediately and may come from any
thread; `poll` is one attribute read. The room itself belongs to the manager's loop thread, which publishes its state in
the handle. `clear()` may be called in any phase, twice, and before a room number is assigned; leaving the handle's
`with` block calls it.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import TypeVar

from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.identity import KVIdentity
from kvroom.core.messages import Failure
from kvroom.core.phases import SUCCEEDED, TERMINAL, KVPoll, Phase
from kvroom.core.room import Room
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.trace import RequestTrace
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

from .arguments import COUNT_END, as_aux, as_count, as_flag, as_pages, as_windows
from .callbacks import OnChange, OnRelease, call_engine
from .causes import cause_of
from .checksum import unreadable
from .driver import Driver
from .logs import log_failure, room_log
from .measure import HandOff
from .page_lists import check_chunk
from .sources import Sources

logger = logging.getLogger(__name__)
HandleT = TypeVar("HandleT", bound="Handle")
ROOM_NUMBERS = COUNT_END


class Handle(ABC):
    """The part of a handle that both sides share. `KVManager.sender` and `KVManager.receiver` create handles."""

    def __init__(
        self,
        driver: Driver,
        room: Room,
        on_release: OnRelease | None,
        *,
        on_change: OnChange | None,
        identity: KVIdentity | None,
        trace: RequestTrace | None,
    ) -> None:
        room.listener = self
        room.trace = None if trace is None else trace.checked()
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
        self._logged_phase = Phase.NEW
        self.bootstrap_room: int | None = None
        """The room's number; None before `init`."""
        self.released = False
        """True once no peer and no transfer can touch pages for this room; it stays so. Set before `on_release` runs.
        """
        if identity is not None:
            self.identify(identity)

    # -- for the engine -------------------------------------------------------------------------------------------

    def init(self, bootstrap_room: int) -> None:
        """Assign the room number, and open the room. A number in use fails the room with `RoomInUse`.

        Raises:
            LocalRoomError: the handle has a number, this one is outside [0, 2**63), or the manager is closed. The
                handle is unchanged.
        """
        if self.bootstrap_room is not None:
            raise LocalRoomError(
                f"room {self.bootstrap_room}: a handle takes one number, got {bootstrap_room} as its second"
            )
        self.bootstrap_room = bootstrap_room = as_count(bootstrap_room, "bootstrap_room")
        if not self._post(self._open):
            self.bootstrap_room = None
            raise LocalRoomError(f"room {bootstrap_room} cannot be opened: this manager is closed")

    def identify(self, identity: KVIdentity) -> None:
        """State the identity of this side's request. Required before pages are offered or sent.

        The room compares the identities of both sides before any byte is written. If they differ, it fails on both
        sides with the same sentence. A second call with the same identity does nothing.

        Raises:
            LocalRoomError: another identity was stated before, or this one has no tokens. The first one stays.
        """
        if not isinstance(identity, KVIdentity) or not identity.travels:
            raise LocalRoomError(
                f"invalid identity of room {self.bootstrap_room}: {identity!r}; give KVIdentity.of(token_ids)"
            )
        if self._identity == identity:
            return
        if self._identity is not None:
            raise LocalRoomError(
                f"room {self.bootstrap_room}: another identity was stated before; use one room for each request"
            )
        self._identity = identity
        self._post(lambda: self._driver.feed(self._room, asked.Identify(identity=identity)))

    def poll(self) -> KVPoll:
        """Return the room's status. One attribute read, without a lock."""
        return self._status

    def abort(self, detail: str = "aborted by the engine") -> None:
        """End the room; `detail` is the reason on both sides. Does nothing if the room has ended."""
        self._post(lambda: self._driver.feed(self._room, asked.GiveUp(detail=str(detail))))

    def clear(self) -> None:
        """Clear the room, in any phase; one that has not ended fails. Idempotent.

        Pages that a peer or a transfer can still touch come back later, through `on_release`.
        """
        self._post(lambda: self._driver.feed(self._room, asked.Clear()))

    def failure_exception(self) -> None:
        """Raise the reason if the room has failed; return otherwise.

        Raises:
            RoomInUse: the number belonged to a room that was open.
            LimitExceeded: the table of rooms was full.
            RoomFailed: any other failure; the text names room, side, phase, peer and reason.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._status is KVPoll.Failed and self._failure is not None:
            raise RoomFailed(self._failure.sentence(self.bootstrap_room))

    def wait(self, timeout_s: float | None = None) -> HandOff:
        """Block until the room has ended, and return its result. Must not be called in the manager's loop thread.

        Args:
            timeout_s: seconds to wait; None waits without a limit. If `poll()` returns `Success` or `Failed`, the call
                returns immediately, even with 0.

        Raises:
            TimeoutError: the room has not ended in time; it is unchanged.
            RoomFailed, RoomInUse, LimitExceeded: the room failed, see `failure_exception`.
        """
        if self._status not in (KVPoll.Failed, KVPoll.Success):  # these are published after the result
            try:
                self._ended.result(timeout_s)
            except FutureTimeoutError:
                raise TimeoutError(
                    f"timed out after {timeout_s} s: room {self.bootstrap_room} is {self._status.name}"
                ) from None
        return self._outcome()

    def __await__(self) -> Generator[object, None, HandOff]:
        """Wait in any event loop, as `wait` does. Cancelling the awaiting task leaves the room unchanged."""
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
        """Publish a status. It has no other effect: cleanup happens in `clear()` only."""
        self._status = status

    def update(self, room: Room) -> None:
        """Publish the room's state: status, failure and, once it has ended, the result. Calls `on_change`."""
        self._failure = room.failure
        if room.phase in TERMINAL and room.failure is None and self._result is None:
            self._result = done = self._hand_off()
            self._driver.hand_offs[room.side].note(done.latency_s, done.nbytes)
        if logger.isEnabledFor(logging.DEBUG) and room.phase is not self._logged_phase:
            self._logged_phase = room.phase
            room_log(logger, room).debug("room %s is %s", self.bootstrap_room, room.phase.name)
        self.update_status(room.status)
        if room.status in (KVPoll.Failed, KVPoll.Success) and not self._ended.done():
            if room.failure is not None:
                log_failure(logger, room, self.bootstrap_room)
            self._ended.set_result(None)
        if self._on_change is not None:
            call_engine(self._on_change, where="on_change")

    def release(self, pages: tuple[int, ...]) -> None:
        """Note that the room has released its pages, and call `on_release`."""
        self.released = True
        if self._on_release is not None:
            call_engine(self._on_release, pages, where=f"on_release of room {self.bootstrap_room}")

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
        """Return the generation for the admission: a sink mints one, a source gets its sink's with the offer (None)."""
        return None

    @abstractmethod
    def _hand_off(self) -> HandOff:
        """Return the result of a room that has just succeeded."""

    def _check_identified(self) -> None:
        if self._identity is None:
            raise LocalRoomError(
                f"room {self.bootstrap_room} has no identity: before its pages are used, give "
                f"identity=KVIdentity.of(token_ids) when the room is opened, or call identify(...)"
            )

    def _compared(self) -> tuple[str, ...]:
        """Return the names of the identity fields that both sides stated, which are equal in a room that succeeded."""
        ours, theirs = self._room.identity, self._room.peer_identity
        return () if ours is None or theirs is None else ours.shared(theirs)

    def _outcome(self) -> HandOff:
        self.failure_exception()
        assert self._result is not None  # ended, and not failed
        return self._result


class KVSender(Handle):
    """The prefill side of one room. Chunks sent before the decode side has offered pages wait for the offer."""

    def __init__(
        self,
        driver: Driver,
        on_release: OnRelease | None,
        *,
        on_change: OnChange | None = None,
        identity: KVIdentity | None = None,
        trace: RequestTrace | None = None,
    ) -> None:
        self._source = Source(driver.table.timeouts)
        self._decode_prefix_len: int | None = None
        self._answered = False
        super().__init__(driver, self._source, on_release, on_change=on_change, identity=identity, trace=trace)
        self._position = 0
        self._last = False
        self._cancel_linger: Callable[[], None] | None = None
        """Cancels the timer of `abort_and_linger`; None while the room does not linger."""

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
        """Hand over the KV of tokens [start, stop), which is computed and lies in `pages`.

        The pages must not change until `on_release`. Only the room's phase is checked later, in the loop thread: a call
        that it does not allow fails the room with the cause `misuse`.

        Args:
            pages: page numbers; `pages[0]` holds token `start`. A page that one chunk filled only in part comes again
                with the next chunk.
            stop: the end of the chunk. The `stop` of the last chunk is the length of the request.
            start: the first token of the chunk; without it the previous `stop`, 0 at first. A rank that has only some
                of the tokens (context parallel) gives it.
            last: True for the last chunk of the request.
            aux: metadata that travels with the last chunk, at most 1 MiB.
            windows: with the last chunk, the pages of every further group of the layout, by name of the group. They
                hold tokens [layout.window_start(group, stop), stop).

        Raises:
            LocalRoomError: `init` was not called, no identity was stated, the last chunk was sent before, or an
                argument is invalid.
            PlanError: the pages are not in the pool, do not hold these tokens, or a group is missing.

        After an exception nothing was sent, and the call can be repeated.
        """
        if self.bootstrap_room is None or self._last:
            reason = "the last chunk was sent before" if self._last else "call init first"
            raise LocalRoomError(f"room {self.bootstrap_room} cannot send pages: {reason}")
        self._check_identified()
        stop, last = as_count(stop, "stop"), as_flag(last, "last")
        begin = self._position if start is None else as_count(start, "start")
        if not self._position <= begin <= stop:
            raise LocalRoomError(
                f"room {self.bootstrap_room}: expected a chunk that begins at token {self._position} or later, "
                f"got tokens [{begin}, {stop})"
            )
        chunk = asked.SendPages(
            pages=as_pages(pages), stop=stop, last=last, aux=as_aux(aux), start=begin, windows=as_windows(windows)
        )
        check_chunk(self._driver.layout, chunk)
        self._position, self._last = stop, last
        self._post(lambda: self._driver.feed(self._room, chunk))

    @property
    def decode_prefix_len(self) -> int | None:
        """The number of leading tokens that every decode rank has already; None until all offers have arrived."""
        return self._decode_prefix_len

    @property
    def answered(self) -> bool:
        """True once each known decode rank has offered pages or was told that the room failed, and one is known."""
        return self._answered

    def abort_and_linger(self, detail: str) -> None:
        """Abort the room, and clear it once its decode side was told the reason.

        For an engine that rejects a request before its decode worker has come. The room stays, without pages, until
        every known decode rank was told, and for `Timeouts.bootstrap_s` at most. A room that succeeded, or that was
        refused, is cleared immediately.

        Args:
            detail: the reason, as in `abort`.
        """

        def begin() -> None:
            if self.answered or self._refusal is not None or self._source.phase in SUCCEEDED:
                self.clear()
            elif self._cancel_linger is None:
                self._cancel_linger = self._driver.loop.call_later(self._source.timeouts.bootstrap_s, self.clear)

        self.abort(detail)
        self._post(begin)

    def update(self, room: Room) -> None:
        """Publish the room's state, and clear a lingering room once its decode side was told."""
        self._decode_prefix_len, self._answered = self._source.decode_prefix_len, self._source.answered
        super().update(room)
        if self._cancel_linger is not None and self.answered:
            self._cancel_linger()
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
        trace: RequestTrace | None = None,
    ) -> None:
        self._sink = Sink(driver.table.timeouts, bootstrap_addr=bootstrap_addr)
        self._sources, self._checksum = sources, checksum
        self._aux = b""
        super().__init__(driver, self._sink, on_release, on_change=on_change, identity=identity, trace=trace)
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
        """Offer pages for tokens [decode_prefix_len, stop) of a request of `tokens` tokens. Call it once.

        From now until `on_release` the prefill side may write all these pages, and they must not be reused.

        Args:
            pages: page numbers; `pages[0]` holds token `decode_prefix_len`. Page borders lie at multiples of the page
                size, counted from token 0.
            tokens: the length of the request.
            decode_prefix_len: the number of leading tokens that this side has already.
            stop: the end of the offered tokens; without it `tokens`. A rank that keeps only a stretch of the request
                gives it.
            windows: for each further group to be moved, its pages, by name of the group. They hold tokens
                [layout.window_start(group, tokens), tokens).
            checksum: True: the room succeeds only if XXH3 over exactly these bytes is equal on both sides, which costs
                a read of the bytes on each side, and a round trip. None: as the manager's `checksum`.

        Raises:
            LocalRoomError: `init` was not called, no identity was stated, pages were offered before, or an argument is
                invalid.
            PlanError: the pages are not in the pool or do not hold these tokens.
            ConfigurationError: a checksum is asked for, and the pool is not in host memory.

        After an exception nothing was offered, and the call can be repeated.
        """
        if self.bootstrap_room is None or self._offered:
            reason = "pages were offered before" if self._offered else "call init first"
            raise LocalRoomError(f"room {self.bootstrap_room} cannot offer pages: {reason}")
        self._check_identified()
        tokens = as_count(tokens, "tokens")
        decode_prefix_len = as_count(decode_prefix_len, "decode_prefix_len")
        end = tokens if stop is None else as_count(stop, "stop")
        if not 0 <= decode_prefix_len <= end <= tokens:
            raise PlanError(
                f"expected 0 <= decode_prefix_len <= stop <= tokens, got decode_prefix_len {decode_prefix_len}, "
                f"stop {end} and tokens {tokens}"
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
        """The metadata that the prefill engine sent with its last chunk; empty before success."""
        return self._aux

    def failure_exception(self) -> None:
        """Raise the reason if the room has failed; return otherwise.

        Raises:
            AddressNotAllowed: the name of the directory resolved to an address that is not on the list.
            RoomInUse, LimitExceeded, RoomFailed: as on the prefill side.
        """
        failure = self._failure
        if self._status is KVPoll.Failed and failure is not None and failure.cause is Cause.NOT_ALLOWED:
            raise AddressNotAllowed(failure.sentence(self.bootstrap_room))
        super().failure_exception()

    def _open(self) -> None:
        super()._open()
        if self._room.number is not None:
            self._sources.find(self._sink, self.bootstrap_addr)
        elif isinstance(self._refusal, LimitExceeded) and self._failure is not None and self.bootstrap_room is not None:
            self._sources.decline(self.bootstrap_addr, self.bootstrap_room, self._failure)

    def update(self, room: Room) -> None:
        """Publish the room's state. A failure makes the next room ask the directory again."""
        if room.failure is not None and not self._ended.done():
            self._sources.note_failure(self.bootstrap_addr, room.failure)
        self._aux = self._sink.aux
        super().update(room)

    def _generation(self) -> int | None:
        return self._sources.new_generation()

    def _hand_off(self) -> HandOff:
        sink = self._sink
        assert sink.offer is not None  # it has landed
        how = ", ".join(sink.transports)
        return HandOff(sink.offer.stop, sink.nbytes, sink.aux, how, sink.took_s, compared=self._compared())

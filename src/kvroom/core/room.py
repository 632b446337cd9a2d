"""One request's hand-off as a pure state machine; what its two halves, `Source` and `Sink`, have in common.

Nothing here does I/O, reads a clock or starts a thread. An input and the time come in through `handle` and `receive`;
effects and one deadline come out, and for a sink that waits for pages the time at which to say so again. A machine is
fed by one owner: the table, in the driver's thread.

The one property that all of this is for: pages are released (`ReleasePages`) only in LANDED, SENT and RELEASED, and a
room enters these only when nobody can write into (sink) or read from (source) them any more.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from kvroom.errors import LocalRoomError

from . import effects as do
from . import inputs as asked
from .causes import TIMED_OUT, Cause
from .identity import KVIdentity
from .messages import Failure, Message, Peer, RoomUse, fitting
from .phases import GIVEN_UP, SUCCEEDED, TERMINAL, Event, KVPoll, Phase, Side, Table
from .settings import Timeouts, Wait

RoomT = TypeVar("RoomT", bound="Room")
Handlers = Mapping[type, Callable[[Any, Any, float], None]]


class Hearing(NamedTuple):
    """How one side hears one type of message: the method that takes it, and the rule that finds its room.

    `take` returns False where the message came late or was not this peer's to say, and has then changed nothing. All
    rooms that `is_for` is asked about have the message's number.
    """

    take: Callable[[Any, Peer, Any, float], bool | None]
    is_for: Callable[[Any, Any], bool] = lambda room, message: room.knows(message.generation)


class Timer(NamedTuple):
    """A wait of a room, and the time at which it times out."""

    wait: Wait
    at: float


class Step(NamedTuple):
    """One entry of a room's history: the phase that it came to, and when."""

    phase: Phase
    at: float


class IndexEntry(NamedTuple):
    """Where the table has filed a room: the table's own note, kept here so that it lives exactly as long."""

    peers: frozenset[Peer] = frozenset()
    timer: Timer | None = None
    phase: Phase | None = None  # None: not counted any more
    quarantined_pages: int = 0
    renewal: Timer | None = None


class RoomListener(Protocol):
    """The holder of a room, which the driver tells of it; an engine's handle. May not block. The core calls none."""

    def update(self, room: Room, /) -> None: ...
    def release(self, pages: tuple[int, ...], /) -> None: ...


class Room(ABC):
    """What both sides share: number, generation, phase, deadline, failure, outbox.

    `timer` is the one deadline: when it runs out, the room takes its next step to the end. `renewal` ends nothing, and
    moves no deadline of this room.
    """

    side: ClassVar[Side]
    table: ClassVar[Table]
    handlers: ClassVar[Handlers]
    hears: ClassVar[Mapping[type, Hearing]]

    def __init__(
        self, timeouts: Timeouts, listener: RoomListener | None = None, identity: KVIdentity | None = None
    ) -> None:
        self.timeouts = timeouts
        self.listener = listener
        self.identity = identity  # of the request, as this side's engine states it; None: not stated yet
        self.number: int | None = None
        self.generation: int | None = None
        self.phase = Phase.NEW
        self.timer: Timer | None = None
        self.renewal: Timer | None = None
        self.failure: Failure | None = None
        self.cleared = False
        self.nbytes = 0  # known to have landed
        self.took_s = 0.0  # see messages.Done
        self.history: tuple[Step, ...] = ()
        self.index_entry = IndexEntry()
        self.outbox: list[do.Effect] = []

    @property
    def status(self) -> KVPoll:
        """What the engine's `poll()` answers."""
        if self.phase in SUCCEEDED:
            return KVPoll.Success
        return KVPoll.Failed if self.phase in GIVEN_UP else self._status()

    def knows(self, generation: int) -> bool:
        """Whether messages of this generation are about this room."""
        return self.generation == generation

    def is_meant_by(self, message: Message) -> bool:
        """Whether a message with this room's number is about this room, so that `receive` should have it."""
        hearing = self.hears.get(type(message))
        return hearing is not None and hearing.is_for(self, message)

    @property
    @abstractmethod
    def peer_identity(self) -> KVIdentity | None:
        """What the other side has stated; None before it has."""

    @property
    def gone(self) -> bool:
        """The engine has cleared it and nobody touches its pages: nothing of it may remain anywhere."""
        return self.cleared and self.phase in TERMINAL

    @property
    def held_pages(self) -> tuple[int, ...]:
        """Pages that the engine must not reuse because of this room."""
        return () if self.phase in TERMINAL else self._pages()

    def admit(self, number: int, generation: int | None, now: float) -> None:
        """Take the number under which both sides meet. The sink brings its own generation, the source has none yet."""
        self._fire(Event.ADMIT)
        self.number, self.generation = number, generation
        self._wait(Wait.BOOTSTRAP, now)

    def handle(self, what: asked.Input, now: float) -> None:
        """Take one input. `LocalRoomError` if this side or phase does not allow it; the room is then unchanged."""
        handler = self.handlers.get(type(what))
        if handler is None:
            raise LocalRoomError(f"{type(what).__name__} is not an input of the {self.side.value} side")
        handler(self, what, now)

    def receive(self, peer: Peer, message: Message, now: float) -> bool:
        """Take one message about this room. False: late, or not this peer's to say; nothing changed."""
        hearing = self.hears.get(type(message))
        return hearing is not None and hearing.take(self, peer, message, now) is not False

    def expire(self, now: float) -> None:
        """Act on the deadline if it has come; else change nothing."""
        if self.timer is None or now < self.timer.at:
            return
        if self.phase in GIVEN_UP:
            again = self.phase is Phase.QUARANTINED
            self._fire(Event.OVERDUE)
            self.outbox += [do.Quarantine(pages=self._pages(), again=again), do.Report()]
            self._ask_again()
            self._wait(Wait.DRAIN, now)
        else:
            wait = self.timer.wait
            after = f"{self.timeouts.of(wait):g} s ({wait.value})"
            self._fail_locally(TIMED_OUT[wait], f"timed out after {after} waiting for {self._awaited()}", now)

    def note(self, now: float) -> None:
        """Enter the phase into the history if it is a new one. A phase that was left in the same call has no entry."""
        if not self.history or self.history[-1].phase is not self.phase:
            self.history += (Step(self.phase, now),)

    @property
    def awaited(self) -> str | None:
        """What it waits for, and for whom; None if for nothing, or only for the engine to clear it."""
        return self._awaited() if self.timer else None

    def take_effects(self) -> list[do.Effect]:
        """What is to be done now, in order; the outbox is empty afterwards."""
        outbox, self.outbox = self.outbox, []
        return outbox

    def copy(self: RoomT) -> RoomT:
        """An independent twin: the machines are small, so that every state of them can be visited."""
        twin = copy.copy(self)
        twin.outbox = list(self.outbox)
        return twin

    @abstractmethod
    def involved(self) -> frozenset[Peer]:
        """The peers whose loss would concern this room."""

    @abstractmethod
    def _status(self) -> KVPoll: ...

    @abstractmethod
    def _pages(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _awaited(self) -> str:
        """Return the end of the sentence "timed out after 5 s waiting for ..."."""

    @abstractmethod
    def _start_draining(self, failure: Failure, now: float) -> None:
        """Leave every other phase for the draining ones; called once at most."""

    @abstractmethod
    def _ask_again(self) -> None:
        """Overdue: ask once more whoever could prove the drain."""

    def _fire(self, event: Event) -> None:
        try:
            self.phase = self.table[self.phase][event]
        except KeyError:
            where = f"on the {self.side.value} side in phase {self.phase.name}"
            raise LocalRoomError(f"room {self.number}: {event.name} is not allowed {where}") from None

    def _wait(self, wait: Wait, now: float) -> None:
        self.timer = Timer(wait, now + self.timeouts.of(wait))

    def _fail_locally(self, cause: Cause, detail: str, now: float, by: Peer | None = None) -> None:
        """Give up for a cause that this side noticed; nothing if the room has ended already.

        The failure names the peer `by` that caused it, or all that are involved where it was not one of them.
        """
        peers = ", ".join(sorted(map(str, {by} if by else self.involved()))) or self._other_side()
        phase, said = self.phase.name, fitting(detail)
        self._fail_with(Failure(side=self.side, phase=phase, peer=fitting(peers), cause=cause, detail=said), now)

    def _other_side(self) -> str:
        """Return the peer that a failure names while none is involved."""
        return "none yet"

    def _fail_with(self, failure: Failure, now: float) -> None:
        if self.phase not in TERMINAL and self.phase not in GIVEN_UP:
            self.failure = failure
            self._start_draining(failure, now)

    def _about(self) -> RoomUse:
        """What every message of this room states."""
        assert self.number is not None
        assert self.generation is not None  # a sink was admitted with it, a source has taken it from its offer
        return {"room": self.number, "generation": self.generation}

    def _enter_terminal(self, event: Event) -> None:
        """Enter a terminal phase: the pages are the engine's again and there is nothing left to wait for."""
        pages = self._pages()
        self._fire(event)
        self.timer = self.renewal = None
        self.outbox += [do.ReleasePages(pages), do.Report()]

    def _stated(self) -> KVIdentity:
        """Return this side's identity. `LocalRoomError` if the engine has not stated it."""
        if self.identity is None:
            raise LocalRoomError(f"room {self.number}: state the identity of the request first (KVIdentity.of(tokens))")
        return self.identity

    def _identify(self, what: asked.Identify, now: float) -> None:  # noqa: ARG002 - one shape for all handlers
        if not what.identity:
            raise LocalRoomError(f"room {self.number}: the identity of the request states no tokens")
        if self.identity not in (None, what.identity):
            raise LocalRoomError(f"room {self.number}: another identity was stated already; one room has one request")
        self.identity = what.identity

    def _asked_to_give_up(self, what: asked.GiveUp, now: float) -> None:
        self._fail_locally(what.cause, what.detail, now)

    def _asked_to_clear(self, what: asked.Clear, now: float) -> None:  # noqa: ARG002 - one shape for all handlers
        self.cleared = True
        self._fail_locally(Cause.CLEARED, "cleared before the hand-off was complete", now)

    common_handlers: ClassVar[Handlers] = {
        asked.Identify: _identify,
        asked.GiveUp: _asked_to_give_up,
        asked.Clear: _asked_to_clear,
    }

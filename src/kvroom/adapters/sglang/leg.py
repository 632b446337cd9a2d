"""One side of one request: the calls of SGLang that its sender and its receiver have in common.

SGLang's scheduler calls both from one thread, in every turn of its loop. It ends if a call raises, or if a queue gets
an unexpected status. No call here waits, and every error becomes the status `Failed` with a sentence, which
`failure_exception` raises when the scheduler asks for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, TypeVar, cast

from kvroom import ROOM_NUMBERS, KVPoll, KVReceiver, KVSender
from kvroom.errors import KVRoomError

log = logging.getLogger(f"sglang.{__name__}")
HandleT = TypeVar("HandleT", KVSender, KVReceiver)
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
ABORTED = "SGLang aborted the request, as it does when its client has left"
ROOM_RULE = "give an int of at least 1, below 2**63 (SGLang keeps 0 for a request whose metadata has not come)"
_ELSEWHERE = "another rank of this server has failed the request"


class TransferFailed(Exception):
    """A failed hand-off in SGLang's form: `failure_reason` for its metrics, `is_from_another_rank` for its log."""

    def __init__(self, reason: str, *, is_from_another_rank: bool = False) -> None:
        super().__init__(reason)
        self.failure_reason = reason
        self.is_from_another_rank = is_from_another_rank


def is_room(room: object) -> bool:
    """Return True if `room` is a room number that both kvroom and SGLang can use."""
    return type(room) is int and 0 < room < ROOM_NUMBERS


class _HasLeg(Protocol):
    @property
    def leg(self) -> Leg[Any]: ...


def supervised(method: MethodT) -> MethodT:
    """Return a wrapper under which an unexpected exception fails the request instead of ending the scheduler.

    The call then returns the leg's status, which is `Failed`. Callers of methods without a result ignore it.
    """

    @functools.wraps(method)
    def call(side: _HasLeg, *args: Any, **kwargs: Any) -> object:
        try:
            return method(side, *args, **kwargs)
        except Exception as error:  # a supervisor: an exception that leaves a backend's call ends SGLang's scheduler
            log.exception(
                "room %s: internal error in kvroom's adapter; the request fails, the server continues", side.leg.room
            )
            side.leg.fail(f"internal error in kvroom's adapter, {type(error).__name__}: {error}")
            return side.leg.status

    return cast("MethodT", call)


class Leg(Generic[HandleT]):
    """One request's handle, and the reason if the adapter has failed the request.

    `handle` is None if no room could be opened. The leg has then failed from the start, and `detail` states why.
    """

    def __init__(self, room: object, open_room: Callable[[int], HandleT]) -> None:
        """Open the room. Never raises, because SGLang creates senders and receivers within its scheduler's loop."""
        self.room = room
        self.handle: HandleT | None = None
        self.detail: str | None = None
        if not is_room(room):
            self.detail = f"invalid bootstrap_room: {ROOM_RULE}"
            return
        try:
            self.handle = open_room(cast("int", room))
        except KVRoomError as error:
            self.detail = str(error)

    @property
    def status(self) -> KVPoll:
        """The room's status, or `Failed` if this leg has failed."""
        if self.detail is not None or self.handle is None:
            return KVPoll.Failed
        return self.handle.poll()

    def fail(self, detail: str) -> None:
        """Fail the leg and abort the room for a reason that the adapter has found. The first reason is kept."""
        if self.detail is None:
            self.detail = detail
        if self.handle is not None:
            self.handle.abort(detail)

    def attempt(self, call: Callable[[], None]) -> bool:
        """Make a call of the library. Return True, or fail the leg with the error's sentence and return False."""
        try:
            call()
        except KVRoomError as error:
            self.fail(str(error))
            return False
        return True

    def raise_failure(self) -> NoReturn:
        """Raise `TransferFailed` with the reason why this leg has failed.

        The room's own sentence takes precedence, because it names side, phase and peer. If the leg has not failed,
        another rank has: SGLang calls this only for requests that it is ending.
        """
        try:
            if self.handle is not None:
                self.handle.failure_exception()
        except KVRoomError as error:
            raise TransferFailed(str(error)) from None
        if self.detail is not None:
            raise TransferFailed(f"room {self.room}: {self.detail}")
        self.fail(_ELSEWHERE)
        raise TransferFailed(f"room {self.room}: {_ELSEWHERE}", is_from_another_rank=True)

"""The part that SGLang's sender and receiver have in common: one side of one request.

SGLang's scheduler calls both in its own thread, in every turn of its loop. It ends if a call raises, or if a queue gets
a status that it does not expect. Therefore no call here waits, and every error becomes the status `Failed` with one
sentence, which `failure_exception` raises when the scheduler asks for it.
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
ABORTED = "SGLang aborted the request, as it does when the client disconnects"
ROOM_RULE = "give an int of at least 1 and below 2**63 (0 means to SGLang that the metadata has not arrived)"
_ON_ANOTHER_RANK = "another rank of this server has failed the request"


class TransferFailed(Exception):
    """A failed hand-off, with the attributes that SGLang reads.

    SGLang uses `failure_reason` in its metrics and `is_from_another_rank` in its log.
    """

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
    """Decorate a method of a sender or receiver: an unexpected exception fails its request and is logged.

    The method then returns the leg's status, which is `Failed`. Callers of a method without a result ignore it.
    """

    @functools.wraps(method)
    def call(side: _HasLeg, *args: Any, **kwargs: Any) -> object:
        try:
            return method(side, *args, **kwargs)
        except Exception as error:  # a supervisor: an exception that leaves a backend's call ends SGLang's scheduler
            log.exception(
                "room %s: internal error in kvroom's adapter; the request fails, the server continues", side.leg.room
            )
            side.leg.fail(f"internal error in kvroom's adapter: {type(error).__name__}: {error}")
            return side.leg.status

    return cast("MethodT", call)


class Leg(Generic[HandleT]):
    """One side of a request: the handle of its room, and the reason of a failure that the adapter has detected.

    If no room could be opened, `handle` is None, `detail` is the reason, and the leg has failed from the start.
    """

    def __init__(self, room: object, open_room: Callable[[int], HandleT]) -> None:
        """Open the room. An error fails the leg and is not raised, because it would end SGLang's scheduler."""
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
        """The status of the room, or `Failed` if the adapter has failed this leg."""
        if self.detail is not None or self.handle is None:
            return KVPoll.Failed
        return self.handle.poll()

    def fail(self, detail: str) -> None:
        """Fail this leg and abort its room with `detail`. If the leg has failed before, the first reason is kept."""
        if self.detail is None:
            self.detail = detail
        if self.handle is not None:
            self.handle.abort(detail)

    def attempt(self, call: Callable[[], None]) -> bool:
        """Call the library. Return True, or fail this leg with the message of a `KVRoomError` and return False."""
        try:
            call()
        except KVRoomError as error:
            self.fail(str(error))
            return False
        return True

    def raise_failure(self) -> NoReturn:
        """Raise `TransferFailed` with the reason of the failure.

        SGLang calls this also if the request failed on another rank. This leg then fails with that reason. The message
        of the room is preferred to the adapter's, because it names side, phase and peer.
        """
        try:
            if self.handle is not None:
                self.handle.failure_exception()
        except KVRoomError as error:
            raise TransferFailed(str(error)) from None
        if self.detail is not None:
            raise TransferFailed(f"room {self.room}: {self.detail}")
        self.fail(_ON_ANOTHER_RANK)
        raise TransferFailed(f"room {self.room}: {_ON_ANOTHER_RANK}", is_from_another_rank=True)

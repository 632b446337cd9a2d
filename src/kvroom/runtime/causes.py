"""The cause under which a failure is counted, for every exception that can end a room. No other module decides it."""

from __future__ import annotations

from kvroom.core.causes import Cause
from kvroom.errors import AddressNotAllowed, LimitExceeded, LocalRoomError, PlanError, RoomInUse

# The first row that fits counts, so a subclass stands before its base.
_CAUSES: tuple[tuple[type[Exception], Cause], ...] = (
    (RoomInUse, Cause.IN_USE),
    (AddressNotAllowed, Cause.NOT_ALLOWED),
    (LocalRoomError, Cause.MISUSE),
    (LimitExceeded, Cause.LIMIT),
    (PlanError, Cause.INCOMPATIBLE),
)


def cause_of(error: BaseException, *, otherwise: Cause = Cause.INTERNAL) -> Cause:
    """Return the cause of a room that this exception ended.

    Args:
        error: what was raised.
        otherwise: the cause for an exception that has no cause of its own: the one of the step that it interrupted,
            such as `TRANSFER` while blocks were submitted.
    """
    return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), otherwise)

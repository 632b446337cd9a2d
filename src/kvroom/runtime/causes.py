"""The cause of a failure for every exception that can end a room. No other module maps exceptions to causes."""

from __future__ import annotations

from kvroom.core.causes import Cause
from kvroom.errors import AddressNotAllowed, LimitExceeded, LocalRoomError, PlanError, RoomInUse

# The first matching row counts, so a subclass precedes its base.
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
        error: the exception.
        otherwise: the cause of an exception that matches no row: that of the step that it interrupted, such as
            `TRANSFER` while blocks were submitted.
    """
    return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), otherwise)

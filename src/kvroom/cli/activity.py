"""The answers of workers that `kvroom rooms` shows, and the difference between two answers of one worker.

Fields that an older worker or a manager's own `StatusServer` does not send have defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from kvroom import RoomView

_ABORTED = "aborted"
_NEVER = 0.0


class Counts(msgspec.Struct, frozen=True):
    """The counts of a worker's rooms since it started, or within an interval."""

    opened: int = 0
    ended: Mapping[str, int] = {}
    """Ended rooms by cause, "" for those that were handed over."""
    handed_over: int = 0
    """Number of hand-offs in `handoff_s` and `nbytes`."""
    handoff_s: float = 0.0
    nbytes: int = 0
    quarantined_pages: int = 0
    """A number of this moment, not a count."""

    @property
    def succeeded(self) -> int:
        """Return the number of rooms that were handed over."""
        return self.ended.get("", 0)

    @property
    def aborted(self) -> int:
        """Return the number of rooms that an engine aborted, for example because the client left."""
        return self.ended.get(_ABORTED, 0)

    @property
    def failed(self) -> int:
        """Return the number of rooms that failed for another cause."""
        return sum(self.ended.values()) - self.succeeded - self.aborted

    def since(self, before: Counts) -> Counts:
        """Return the counts from `before` until now; all of them if the worker has started again in between."""
        ended = {cause: rooms - before.ended.get(cause, 0) for cause, rooms in self.ended.items()}
        if self.opened < before.opened or any(rooms < 0 for rooms in ended.values()):
            return self
        return Counts(
            self.opened - before.opened, ended, self.handed_over - before.handed_over,
            self.handoff_s - before.handoff_s, self.nbytes - before.nbytes, self.quarantined_pages,
        )  # fmt: skip


class Pool(msgspec.Struct, frozen=True):
    """The pages of a worker's pool."""

    pages: int
    free: int
    cached: int = 0
    """Pages of the prefix cache that no request uses; they are given up for a new request."""


class OpenRooms(msgspec.Struct, frozen=True):
    """The part of a `/rooms` response that this command shows."""

    open: tuple[RoomView, ...]
    """The oldest open rooms."""
    kept: int | None = None
    """The number of all open rooms; None if `open` has all of them."""
    counts: Counts | None = None
    """None if the worker is of a version that has no counts in `/rooms`."""
    pool: Any = None
    """The pool of kvroom's engine. The owner of a `StatusServer` may show anything under this name."""

    @property
    def number(self) -> int:
        """Return the number of all open rooms."""
        return len(self.open) if self.kept is None else self.kept

    def pages(self) -> Pool | None:
        """Return the pool's pages, or None if the answer has none in this form."""
        with suppress(msgspec.ValidationError):
            return msgspec.convert(self.pool, Pool)
        return None


class EndedRoom(msgspec.Struct, frozen=True):
    """One entry of `recent` in a `/stats` response."""

    room: int | None = None
    request_id: str = ""
    ended_at: float | None = None
    """Unix seconds on the worker's clock."""
    outcome: str = "succeeded"
    error: str | None = None
    handoff_s: float | None = None
    nbytes: int | None = None


class Stats(msgspec.Struct, frozen=True):
    """A `/stats` response; the newest room is the last one of `recent`."""

    recent: tuple[EndedRoom, ...] = ()


class Activity(NamedTuple):
    """One row of the table of workers."""

    worker: str
    """The worker's role and address."""
    answer: OpenRooms
    counts: Counts | None
    """The counts of the last `interval_s`, or since the start. None if the worker has none."""
    interval_s: float | None
    """Seconds since the answer with which this one is compared; None if it is the first one."""


class Sample(NamedTuple):
    """The counts of a worker at one moment."""

    at_s: float
    """The time on the monotonic clock."""
    counts: Counts


def activity(worker: str, answer: OpenRooms, at_s: float, before: Sample | None) -> Activity:
    """Return the row of a worker that gave `answer` at `at_s` on the monotonic clock; `before` is its last sample."""
    if answer.counts is None or before is None:
        return Activity(worker, answer, answer.counts, None)
    return Activity(worker, answer, answer.counts.since(before.counts), at_s - before.at_s)


def newest(ended: Iterable[tuple[str, Sequence[EndedRoom]]], limit: int) -> list[tuple[str, EndedRoom]]:
    """Return the last `limit` rooms of several workers with their worker, newest first; those without a time last."""
    rows = [(worker, room) for worker, rooms in ended for room in reversed(rooms)]
    return sorted(rows, key=lambda row: row[1].ended_at or _NEVER, reverse=True)[:limit]

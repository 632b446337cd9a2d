"""The tables and texts of `kvroom rooms`.

Text from peers is escaped, so that it cannot reach the terminal as markup or as control codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvroom import Phase, RoomView

from .activity import Activity, EndedRoom

_NUMBERS = frozenset(
    {"room", "for", "deadline in", "pages", "bytes", "open", "handed over", "failed", "aborted", "ended/s", "hand-off",
     "MB/s", "free pages", "quarantined"}
)  # fmt: skip


def title(now: datetime, workers: int, interval_s: float | None) -> Text:
    """Return the first line: the time with its zone, the number of workers that answered and the span of the counts."""
    clock = now.astimezone().isoformat(sep=" ", timespec="seconds")
    if not workers:
        return Text(f"{clock}, no worker answered")
    span = "counts since each worker started" if interval_s is None else f"counts of the last {interval_s:.1f} s"
    return Text(f"{clock}, {workers} {'worker' if workers == 1 else 'workers'}, {span}")


def workers_table(rows: Sequence[Activity]) -> RenderableType:
    """Return one line for each worker: its open rooms, and the counts of rooms that ended. "-" is not known."""
    names = ("worker", "open", "handed over", "failed", "aborted", "ended/s", "hand-off", "MB/s", "free pages",
             "quarantined")  # fmt: skip
    table = _table(names)
    for row in rows:
        table.add_row(*map(escaped, (row.worker, str(row.answer.number), *_count_cells(row), *_page_cells(row))))
    return table


def _count_cells(row: Activity) -> tuple[str, ...]:
    counts, interval_s = row.counts, row.interval_s
    if counts is None:
        return ("-",) * 6
    mean = f"{counts.handoff_s / counts.handed_over * 1e3:.2f} ms" if counts.handed_over else "-"
    rates = ("-", "-")
    if interval_s:
        rates = (f"{sum(counts.ended.values()) / interval_s:.1f}", f"{counts.nbytes / interval_s / 1e6:.1f}")
    return (str(counts.succeeded), str(counts.failed), str(counts.aborted), rates[0], mean, rates[1])


def _page_cells(row: Activity) -> tuple[str, str]:
    pool = row.answer.pages()
    free = "-" if pool is None else f"{pool.free + pool.cached} of {pool.pages}"
    return free, "-" if row.counts is None else str(row.counts.quarantined_pages)


def rooms_table(views: Sequence[tuple[str, RoomView]], *, total: int, limit: int) -> RenderableType:
    """Return the oldest rooms first, at most `limit`, and their number. Each view comes with the name of its worker."""
    oldest = sorted(views, key=lambda one: age_s(one[1]), reverse=True)[:limit]
    rows = _table(("worker", "room", "side", "phase", "for", "waits for", "deadline in", "peers", "pages", "bytes"))
    for worker, view in oldest:
        deadline = "" if view.waits_until_s is None else _seconds(view.waits_until_s)
        held = (", ".join(view.peers), str(view.pages), str(view.nbytes))
        where = (worker, str(view.room), f"{view.side} side", view.phase, _seconds(in_phase_s(view)))
        rows.add_row(*map(escaped, (*where, _waits_for(view), deadline, *held)))
    more = f", the {len(oldest)} oldest are shown" if total > len(oldest) else ""
    foot = Text(f"{total} {'room' if total == 1 else 'rooms'} open{more}")
    return Group(rows, foot) if oldest else foot


def ended_table(ended: Sequence[tuple[str, EndedRoom]]) -> RenderableType:
    """Return one line for each of these rooms, in their order. Each comes with the name of its worker."""
    if not ended:
        return Text("no room has ended yet that a worker remembers")
    rows = _table(("ended at", "worker", "room", "hand-off", "bytes", "how it ended"))
    for worker, room in ended:
        at = "-" if room.ended_at is None else datetime.fromtimestamp(room.ended_at).isoformat(" ", "milliseconds")[11:]
        took = "-" if room.handoff_s is None else f"{room.handoff_s * 1e3:.2f} ms"
        end = "handed over" if room.outcome == "succeeded" else f"failed: {room.error or 'no cause was given'}"
        number, nbytes = ("-" if value is None else str(value) for value in (room.room, room.nbytes))
        rows.add_row(*map(escaped, (at, worker, number, took, nbytes, end)))
    return Group(Text("the last rooms that ended, newest first"), rows)


def _table(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        may_wrap = name in ("waits for", "how it ended")
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=not may_wrap)
    return table


def details(url: str, view: RoomView) -> RenderableType:
    """Return the text about one room: its phase, what it waits for, and the time spent in each phase so far."""
    more = f", {_seconds(view.waits_until_s)} more" if view.waits_for else ""
    lines = [
        f"room {view.room} on {url}, {view.side} side: {view.phase} for {_seconds(in_phase_s(view))}",
        f"  waits for {_waits_for(view)}{more}",
        f"  peers: {', '.join(view.peers) or 'none'}; pages held: {view.pages}; bytes landed: {view.nbytes}"
        f"{'; cleared by its engine' if view.cleared else ''}",
    ]
    if view.identity or view.peer_identity:
        lines.append(f"  identity: {', '.join(_identity(view))}")
    if view.failure:
        lines.append(f"  {view.failure}")
    rows = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2))
    for name in ("phase", "since (s ago)", "for (s)"):
        rows.add_column(name, justify="left" if name == "phase" else "right")
    ends = [ago for _, ago in view.timeline[1:]] + [0.0]
    for (phase, ago), end in zip(view.timeline, ends, strict=True):
        rows.add_row(escaped(phase), f"{ago:.3f}", f"{ago - end:.3f}")
    return Group(*(escaped(line) for line in lines), rows)


def age_s(view: RoomView) -> float:
    """Return the seconds since the room was opened."""
    return view.timeline[0][1] if view.timeline else 0.0


def in_phase_s(view: RoomView) -> float:
    """Return the seconds since the room entered its current phase."""
    return view.timeline[-1][1] if view.timeline else 0.0


def _identity(view: RoomView) -> Iterator[str]:
    """Yield each field of the request's identity with its digest and the side or sides that have sent it."""
    for name in sorted(view.identity.keys() | view.peer_identity.keys()):
        here, there = view.identity.get(name), view.peer_identity.get(name)
        if here == there:
            yield f"{name} {here} (both sides)"
        elif here is not None and there is not None:
            yield f"{name} {here} here, {there} on the other side"
        elif here is None:
            yield f"{name} {there} (only the other side)"
        else:
            yield f"{name} {here} ({'only this side' if view.peer_identity else 'the other side has not sent its own'})"


def _waits_for(view: RoomView) -> str:
    if view.phase == Phase.QUARANTINED.name:
        return f"{view.waits_for} (the room ended with {view.cause})"
    return view.waits_for or "its engine to clear it"  # an ended room stays in the table until then


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def escaped(said: str) -> Text:
    """Return text without markup and with `?` for every character that is not printable."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in said))

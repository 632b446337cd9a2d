"""Rooms as people read them: one line for each in a table, or one room with its timeline.

What peers have said is shown as it is, but never reaches the terminal as markup or as control codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvroom import Phase, RoomView

PAPER_COLUMNS = 180
"""The width of a table that goes to a file or a pipe."""

AnswerT = TypeVar("AnswerT")
_COLUMNS = ("worker", "room", "side", "phase", "for", "waits for", "deadline in", "peers", "pages", "bytes")
_NUMBERS = frozenset({"room", "for", "deadline in", "pages", "bytes"})


@dataclass(frozen=True)
class Asked(Generic[AnswerT]):
    """A worker's answer, or why there is none."""

    url: str
    answer: AnswerT | None
    fault: str | None


def table(views: Sequence[tuple[str, RoomView]], *, total: int, limit: int) -> RenderableType:
    """The oldest rooms first, at most `limit`; `total` is how many there are."""
    oldest = sorted(views, key=lambda one: age_s(one[1]), reverse=True)[:limit]
    rows = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        rows.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=name not in ("waits for",))
    for url, view in oldest:
        rows.add_row(*(_text(cell) for cell in _cells(url, view)))
    more = f", the {len(oldest)} oldest are shown" if total > len(oldest) else ""
    return Group(rows, Text(f"{total} {'room' if total == 1 else 'rooms'} open{more}"))


def story(url: str, view: RoomView) -> RenderableType:
    """One room: where it stands, what it waits for, and each phase that it came to."""
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
        rows.add_row(_text(phase), f"{ago:.3f}", f"{ago - end:.3f}")
    return Group(*(_text(line) for line in lines), rows)


def age_s(view: RoomView) -> float:
    """Since it was opened."""
    return view.timeline[0][1] if view.timeline else 0.0


def in_phase_s(view: RoomView) -> float:
    """Since it came to the phase where it stands."""
    return view.timeline[-1][1] if view.timeline else 0.0


def _cells(url: str, view: RoomView) -> tuple[str, ...]:
    deadline = "" if view.waits_until_s is None else _seconds(view.waits_until_s)
    held = (", ".join(view.peers), str(view.pages), str(view.nbytes))
    return (
        urlsplit(url).netloc, str(view.room), view.side, view.phase, _seconds(in_phase_s(view)), _waits_for(view),
        deadline, *held,
    )  # fmt: skip


def _identity(view: RoomView) -> Iterator[str]:
    """Yield each field of the request's identity with its digest, and which side has stated it."""
    for name in sorted(view.identity.keys() | view.peer_identity.keys()):
        here, there = view.identity.get(name), view.peer_identity.get(name)
        if here == there:
            yield f"{name} {here} (both sides)"
        elif here is not None and there is not None:
            yield f"{name} {here} here, {there} on the other side"
        elif here is None:
            yield f"{name} {there} (only the other side)"
        else:
            yield f"{name} {here} ({'only this side' if view.peer_identity else 'the other side is not heard yet'})"


def _waits_for(view: RoomView) -> str:
    if view.phase == Phase.QUARANTINED.name:
        return f"{view.waits_for} (the room ended with {view.cause})"
    return view.waits_for or "its engine to clear it"  # the table lets it go as soon as that is done


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _text(said: str) -> Text:
    return Text("".join(letter if letter.isprintable() else "?" for letter in said))

"""What the demo asks: two short questions, and one about a text of more than a thousand tokens."""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """`title` is shown, `content` is sent as the user's turn of a chat."""

    title: str
    content: str


_STOPS = (
    "Alder Bridge", "Birch Market", "Cooper Street", "Dock Road", "Elm Gardens", "Foundry Lane", "Granary Square",
    "Harbour View", "Ivy Terrace", "Juniper Hill", "Kiln Corner", "Lantern Quay", "Mill Pond", "North Gate",
)  # fmt: skip
_LINES = 40


def questions() -> list[Question]:
    """The three questions of the demo."""
    return [
        Question("What is the capital of France?", "What is the capital of France?"),
        Question("Why is the sky blue?", "Why is the sky blue? Answer in two sentences."),
        Question(f"a tram timetable of {_LINES} lines, and a question about it", _timetable()),
    ]


def _timetable() -> str:
    entries = [
        f"Tram {number} leaves {_STOPS[number * 5 % len(_STOPS)]} at {6 + number // 6:02d}:{number * 10 % 60:02d} "
        f"and reaches {_STOPS[(number * 5 + 3) % len(_STOPS)]} {12 + number * 7 % 23} minutes later."
        for number in range(1, _LINES + 1)
    ]
    lines = "\n".join(entries)
    return (
        f"Here is the timetable of a small town.\n{lines}\nWhere does tram 1 leave, and when? Answer in one sentence."
    )

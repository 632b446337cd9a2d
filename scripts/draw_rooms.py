"""Write docs/rooms.md, the state diagrams of a room, from the transition tables. `--check` only compares.

Run: python scripts/draw_rooms.py [--check]
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from kvroom.core.phases import SINK, SOURCE, TERMINAL, Phase, Table
from kvroom.core.room import Room
from kvroom.core.settings import Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source

TARGET = Path(__file__).resolve().parent.parent / "docs" / "rooms.md"
HEAD = """# The phases of a room

`python scripts/draw_rooms.py` generates this page from the tables in `src/kvroom/core/phases.py`, and a test compares
them. Phases only go forward, and a room never leaves a terminal phase. An event that is not drawn raises an error and
changes nothing. Pages are released when a room enters a terminal phase (LANDED, SENT or RELEASED), and in no other way.
[When something breaks](failures.md) says which events end a room, and when.
"""

NOTES: dict[type[Room], str] = {
    Sink: (
        "In OPENED, `poll()` answers WaitingForInput as soon as the links to all prefill ranks are up. From then "
        "until it offers pages the room sends them a renewal, the first after `offer_s` and another every `renew_s`."
    ),
    Source: (
        "In EXPECTED each renewal of a decode side starts the wait of `bootstrap_s` again; in other phases it moves no "
        "deadline. An engine may send chunks in EXPECTED already: they wait for the offer. In READY, `poll()` answers "
        "WaitingForInput once every decode rank that this rank serves has offered pages, which is immediately if there "
        "is only one."
    ),
}


def status_in(side: type[Room], phase: Phase) -> str:
    """Return what `poll()` returns in a phase."""
    room = side(Timeouts())
    room.phase = phase
    return room.status.name


def diagram(table: Table) -> Iterator[str]:
    """Yield the lines of one table as a Mermaid state diagram."""
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {Phase.NEW.name}"
    for phase, events in table.items():
        for event, after in events.items():
            yield f"    {phase.name} --> {after.name}: {event.name}"
        if phase in TERMINAL:
            yield f"    {phase.name} --> [*]: cleared"
    yield "```"


def page() -> str:
    """Return the whole page."""
    lines = [HEAD]
    for title, side, table in (("Decode side (sink)", Sink, SINK), ("Prefill side (source)", Source, SOURCE)):
        lines += [f"## {title}", "", *diagram(table), "", "| phase | `poll()` |", "| --- | --- |"]
        lines += [f"| {phase.name} | {status_in(side, phase)} |" for phase in table]
        lines += ["", *textwrap.wrap(NOTES[side], 120), ""]
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        return int(TARGET.read_text() != page())
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

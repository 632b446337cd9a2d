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

Generated from the tables in `src/kvroom/core/phases.py` by `python scripts/draw_rooms.py`; a test compares them.
Phases only go forward, terminal phases absorb, and an event that is not drawn raises and changes nothing. Pages are
released on entering a terminal phase, and in no other way.
"""

NOTES: dict[type[Room], str] = {
    Sink: (
        "In ALLOCATED the answer becomes WaitingForInput when the links to all sources are up. From then until the "
        "offer the sink renews: every `renew_s` it tells its sources that it still wants the room."
    ),
    Source: (
        "In EXPECTED each renewal of a sink lets the source wait its whole `bootstrap_s` anew; elsewhere it moves no "
        "deadline. "
        "An engine may send chunks in EXPECTED already: they wait for the offer. In READY the answer becomes "
        "WaitingForInput when every decode rank that this rank serves has offered: at once, where there is one."
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
    for title, side, table in (("Sink (decode side)", Sink, SINK), ("Source (prefill side)", Source, SOURCE)):
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

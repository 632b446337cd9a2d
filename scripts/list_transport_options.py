"""Write the table of options in docs/transports.md from the transports themselves. `--check` only compares.

Run: python scripts/list_transport_options.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvroom.transports.selection.options import by_option, without

TARGET = Path(__file__).resolve().parent.parent / "docs" / "transports.md"
BEGIN, END = (
    "<!-- the table below: scripts/list_transport_options.py -->\n",
    "<!-- the table above: scripts/list_transport_options.py -->\n",
)


def table() -> str:
    """Return the generated part of the page."""
    lines = ["| transport | option | default | meaning |", "| --- | --- | --- | --- |"]
    for option, names in by_option().items():
        default = f"`{option.default}`" if option.default else ""
        lines.append(f"| {_joined(names)} | `{option.name}` | {default} | {option.description} |")
    lines.append(f"| {_joined(without())} | none | | |")
    return "\n".join(lines)


def _joined(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    """Return the page with a newly generated table."""
    before, begin, rest = TARGET.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{TARGET} has no place for the table: add the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        return int(TARGET.read_text() != page())
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

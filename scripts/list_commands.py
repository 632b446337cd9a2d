"""Write docs/command-line.md, the reference of the command line, from the parsers. `--check` only compares.

Run: python scripts/list_commands.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import msgspec

from kvroom.cli.options import CommandOption, WorkerOptions, options_of
from kvroom.cli.parser import COMMANDS, SOAK, Command

TARGET = Path(__file__).resolve().parent.parent / "docs" / "command-line.md"
BEGIN = """\
# Command line

`python scripts/list_commands.py` generates this page from the parsers, and a test compares them. `kvroom COMMAND
--help` prints the same texts. An option can be given as `--name VALUE` or `--name=VALUE`.

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | the command ran and reports a negative result, such as a demo with a wrong token |
| 2 | an argument or a setting is invalid: one line on stderr names it and the remedy |
| 130 | interrupted (Ctrl-C) |
"""
WORKERS = "Options of every worker"
COMMANDS_WITH_THEM = """\
`kvroom prefill` and `kvroom decode` take these options. `kvroom up` and `kvroom demo` take them as well, and pass them
to the workers that they start."""
LABORATORY = """\
Every argument goes to the soak of the [laboratory](architecture.md#the-parts), which `pip install -e lab` installs in
a clone. `kvroom soak --help` then lists the options; [the soak](soak.md) has the most useful ones."""


def anchor(title: str) -> str:
    """Return the anchor of a heading of this page."""
    return title.lower().replace(" ", "-")


def name(option: CommandOption) -> str:
    """Return an option in the form of a command line, with the placeholder of its value."""
    form = option.flag.form
    if option.flag.is_positional:
        return f"`{form.metavar}{' ...' if form.nargs else ''}`"
    if option.hint is bool:
        return f"`{option}`, `--no-{str(option)[2:]}`" if option.default else f"`{option}`"
    if get_origin(option.hint) is Literal:
        return f"`{option} {{{','.join(get_args(option.hint))}}}`"
    metavar = form.metavar or option.name.upper()
    return f"`{option} {metavar if isinstance(metavar, str) else ' '.join(metavar)}`"


def default(option: CommandOption) -> str:
    """Return the default as text, `required`, or "" if there is none to show."""
    if option.default is msgspec.NODEFAULT or (option.flag.is_positional and option.flag.form.nargs != "*"):
        return "required"
    if option.default is None or option.default == () or option.default is False:
        return ""
    if option.default is True:
        return "on"
    text = option.default if isinstance(option.default, str) else json.dumps(option.default).removesuffix(".0")
    return f"`{text}`"


def meaning(option: CommandOption) -> str:
    """Return the help of an option as the cell of a table."""
    more = "; [all of them](transports.md#the-transports)" if option.name == "transport_option" else ""
    return f"{option.flag.help}{more}".replace("|", "\\|").replace("*", "\\*")


def table(options: Iterable[CommandOption]) -> Iterator[str]:
    """Yield a table with a row for each option that the help shows."""
    yield from ("| option | default | meaning |", "| --- | --- | --- |")
    for option in options:
        if option.flag.help != argparse.SUPPRESS:
            yield f"| {name(option)} | {default(option)} | {meaning(option)} |"


def section(command: Command) -> Iterator[str]:
    """Yield the section of a command."""
    yield from ("", f"## kvroom {command.name}", "", f"{command.help[0].upper()}{command.help[1:]}.")
    if command is SOAK:
        yield from ("", LABORATORY)
        return
    shared = shared_names() if issubclass(command.options, WorkerOptions) else set()
    own = [option for option in options_of(command.options) if option.name not in shared]
    if own:
        yield ""
        yield from table(own)
    if shared:
        yield from ("", f"It also takes the [options of every worker](#{anchor(WORKERS)}).")


def shared_names() -> set[str]:
    """Return the names of the options that all workers have."""
    return {option.name for option in options_of(WorkerOptions)}


def workers() -> Iterator[str]:
    """Yield the section of the options that all workers have."""
    yield from ("", f"## {WORKERS}", "", COMMANDS_WITH_THEM)
    groups: dict[str, list[CommandOption]] = {}
    for option in options_of(WorkerOptions):
        groups.setdefault(option.flag.group, []).append(option)
    for title, options in groups.items():
        yield from ("", f"### {title[0].upper()}{title[1:]}", "")
        yield from table(options)


def page() -> str:
    """Return the whole page."""
    lines = [BEGIN.rstrip()]
    for command in COMMANDS:
        lines += section(command)
    return "\n".join([*lines, *workers(), ""])


def main() -> int:
    """Write the page, or compare it."""
    if sys.argv[1:] == ["--check"]:
        return int(not TARGET.exists() or TARGET.read_text() != page())
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

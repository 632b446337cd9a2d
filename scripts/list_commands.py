"""Write docs/command-line.md, the reference of the command line, from the parsers. `--check` only compares.

Run: python scripts/list_commands.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from kvroom.cli.exit_status import ExitStatus
from kvroom.cli.options import CommandOption, WorkerOptions, options_of, rest_of
from kvroom.cli.parser import COMMANDS, SOAK, Command

TARGET = Path(__file__).resolve().parent.parent / "docs" / "command-line.md"
BEGIN = """\
# Command line

`python scripts/list_commands.py` generates this page from the parsers, and a test compares them. `kvroom COMMAND
--help` prints the same texts. An option can be given as `--name VALUE` or `--name=VALUE`.

Every option has a variable, which counts if the option is not given: `--page-tokens` is `KVROOM_PAGE_TOKENS`. An empty
variable counts as unset. For an option without a value give 1 or 0. For one that can be given several times, separate
the values with spaces and quote them as in a shell: `KVROOM_DECODE="http://10.0.0.2:8000 http://10.0.0.3:8000"`.
Kubernetes sets `KVROOM_PORT` to a text that begins with `tcp://` beside a service named `kvroom`; that is ignored.

`eval "$(kvroom completion bash)"` completes commands and options in bash; zsh and tcsh work as well.

| exit status | meaning |
| --- | --- |
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
    if option.flag.is_positional:
        return "" if option.flag.form.nargs == "*" else "required"
    shown = option.shown_default()
    return shown if shown in ("", "required", "on") else f"`{shown}`"


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
    if (rest := rest_of(command.options)) is not None:
        yield from ("", f"`-- {rest.flag.form.metavar} ...`: {rest.flag.help}.")
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
    lines = [BEGIN.rstrip(), *(f"| {status.value} | {status.meaning} |" for status in ExitStatus)]
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

"""The parser: every command with its help, the struct of its options and the function that runs it.

A command's module is imported only when the command runs, so that `kvroom --help` loads neither torch nor aiohttp.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from .options import (
    CommandOption,
    CommandOptions,
    DecodeOptions,
    DemoOptions,
    DoctorOptions,
    FenceOptions,
    PrefillOptions,
    RoomsOptions,
    RouterOptions,
    SoakOptions,
    UpOptions,
    options_of,
)


class Command(NamedTuple):
    """One command of `kvroom`."""

    name: str
    """The name on the command line."""
    run: str
    """The function that gets the options, as `module:name` within `kvroom.cli`."""
    options: type[CommandOptions]
    """The struct of its options."""
    help: str
    """One line that describes the command."""

    def __call__(self, options: CommandOptions) -> int:
        """Import the command's module, run it and return its exit status."""
        module, _, name = self.run.partition(":")
        function: Callable[[CommandOptions], int] = getattr(importlib.import_module(f"kvroom.cli.{module}"), name)
        return function(options)


SOAK = Command(
    "soak", "soak:run_soak", SoakOptions,
    "hand over many rooms between two processes, with faults (for development: needs the laboratory)",
)  # fmt: skip
COMMANDS = (
    Command("prefill", "worker:run_worker", PrefillOptions, "run one prefill worker"),
    Command("decode", "worker:run_worker", DecodeOptions, "run one decode worker"),
    Command("router", "router:run_router", RouterOptions, "run the router (smg) in front of running workers"),
    Command("up", "cluster:run_up", UpOptions, "run workers and router together on this machine"),
    Command(
        "demo", "demo:run_demo", DemoOptions,
        "stream three answers through a prefill worker, a decode worker and the router, and check every token",
    ),
    Command("rooms", "rooms:run_rooms", RoomsOptions, "show the open rooms of workers"),
    Command(
        "fence", "fence:run_fence", FenceOptions,
        "confirm to workers that the processes of a lost host have ended, so that they release quarantined pages",
    ),
    Command(
        "doctor", "doctor:run_doctor", DoctorOptions,
        "report which transports can run here, which one `auto` would choose, and what is missing",
    ),
    SOAK,
)  # fmt: skip


class Invocation(NamedTuple):
    """A parsed command line."""

    command: Command
    """The command to run."""
    options: Any
    """Its options: a struct of the type `command.options`."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that appends the default, except for an option whose default is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest == "transport_option":
            # Transports take long to import: import them only when this help is printed.
            listing: str = importlib.import_module("kvroom.transports.selection.options").in_words()
            return f"{action.help}. {listing.replace('%', '%%')}"
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Parse a command line; None stands for the arguments of this process.

    An invalid one raises `SystemExit` with status 2, and `--help` raises it with status 0.
    """
    parser = argparse.ArgumentParser(
        prog="kvroom",
        description="Serve a model with its prefill in one process and its decode in another.",
        epilog="`kvroom COMMAND --help` shows the options of a command. Start with `kvroom demo`.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        if command is SOAK:
            # With an impossible prefix character argparse sees no options here, so that every argument, --help too,
            # reaches the laboratory's parser.
            one = commands.add_parser(command.name, help=command.help, prefix_chars="\0", add_help=False)
        else:
            one = commands.add_parser(
                command.name, help=command.help, description=command.help, formatter_class=_HelpFormatter
            )
        one.set_defaults(command=command)
        places: dict[str, argparse._ActionsContainer] = {"": one}
        for option in options_of(command.options):
            title = option.flag.group
            if title not in places:
                places[title] = one.add_argument_group(title)
            _add(places[title], option)
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    return Invocation(command, msgspec.convert(given, command.options))


def _add(place: argparse._ActionsContainer, option: CommandOption) -> None:
    form, default = option.flag.form, option.default
    more: dict[str, Any] = {"type": form.read, "metavar": form.metavar, "action": form.action, "nargs": form.nargs}
    if option.flag.is_positional:
        place.add_argument(option.name, help=option.flag.help, **more)
        return
    if option.hint is bool:
        more = {"action": argparse.BooleanOptionalAction if default else "store_true"}
    elif get_origin(option.hint) is Literal:
        more = {"choices": get_args(option.hint)}
    elif default is msgspec.NODEFAULT:
        more |= {"required": True}
        default = argparse.SUPPRESS
    if isinstance(default, tuple):
        default = list(default)  # argparse appends to a copy of the default, which has to be a list
    place.add_argument(str(option), help=option.flag.help, default=default, **more)

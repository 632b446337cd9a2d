"""The parser: every command with its help, the struct of its options and the function that runs it.

Commands are imported when they are run, so that `kvroom --help` loads neither torch nor aiohttp.
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
    """One command: `run` is the function, as `module:name` within `kvroom.cli`, that takes its options."""

    name: str
    run: str
    options: type[CommandOptions]
    help: str

    def __call__(self, options: CommandOptions) -> int:
        """Import the command and run it. Returns its exit status."""
        module, _, name = self.run.partition(":")
        function: Callable[[CommandOptions], int] = getattr(importlib.import_module(f"kvroom.cli.{module}"), name)
        return function(options)


SOAK = Command(
    "soak", "soak:run_soak", SoakOptions,
    "hand many rooms over between two processes, with faults (development: needs the laboratory)",
)  # fmt: skip
COMMANDS = (
    Command("prefill", "worker:run_worker", PrefillOptions, "run one prefill worker"),
    Command("decode", "worker:run_worker", DecodeOptions, "run one decode worker"),
    Command("router", "router:run_router", RouterOptions, "run the router (smg) in front of running workers"),
    Command("up", "cluster:run_up", UpOptions, "run workers and router together on this machine"),
    Command(
        "demo", "demo:run_demo", DemoOptions,
        "stream three answers through prefill, decode and router, and check every token",
    ),
    Command("rooms", "rooms:run_rooms", RoomsOptions, "show the rooms that are open on workers"),
    Command(
        "fence", "fence:run_fence", FenceOptions,
        "tell workers that the processes of a lost host have ended, so that its pages come back",
    ),
    Command(
        "doctor", "doctor:run_doctor", DoctorOptions,
        "say which transports can run here, which `auto` would choose, and what is missing",
    ),
    SOAK,
)  # fmt: skip


class Invocation(NamedTuple):
    """A command and the options that it was given."""

    command: Command
    options: Any
    """A struct of the command's kind."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest == "transport_option":
            # The transports are loaded only where their options are shown.
            listing: str = importlib.import_module("kvroom.transports.selection.options").in_words()
            return f"{action.help}. {listing.replace('%', '%%')}"
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Read a command line (None: that of this process). One that is wrong ends the process with status 2, as `--help`
    does with status 0.
    """
    parser = argparse.ArgumentParser(
        prog="kvroom",
        description="Serve a model with its prefill in one process and its decode in another.",
        epilog="`kvroom COMMAND --help` shows the options of a command. Start with `kvroom demo`.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        if command is SOAK:
            # No character begins an option here: every argument, --help among them, is for the laboratory's parser.
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
        default = list(default)  # argparse appends to a copy of it
    place.add_argument(str(option), help=option.flag.help, default=default, **more)

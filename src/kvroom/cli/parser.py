"""The parser: every command with its help, the struct of its options and the function that runs it.

A command's module is imported only when the command runs, so that `kvroom --help` loads neither torch nor aiohttp.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import msgspec

from kvroom import __version__
from kvroom.errors import ConfigurationError

from .extras import require
from .options import (
    CommandOption,
    CommandOptions,
    CompletionOptions,
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
    rest_of,
)
from .variables import read_variable, variable_of


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
    extra: str = ""
    """The extra of kvroom that the command needs, or ""."""
    modules: tuple[str, ...] = ()
    """The modules of that extra that it needs, if not all."""

    def __call__(self, options: CommandOptions) -> int:
        """Import the command's module, run it and return its exit status.

        Raises `ConfigurationError` if a package that the command needs is not installed.
        """
        require(f"kvroom {self.name}", self.extra, only=self.modules)
        module, _, name = self.run.partition(":")
        function: Callable[[CommandOptions], int] = getattr(importlib.import_module(f"kvroom.cli.{module}"), name)
        return function(options)


SOAK = Command(
    "soak", "soak:run_soak", SoakOptions,
    "hand over many rooms between two processes, with faults (for development: needs the laboratory)",
)  # fmt: skip
_WORKER = ("torch", "transformers", "jinja2", "prometheus_client")
_UP = (*_WORKER, "smg")
COMMANDS = (
    Command("prefill", "worker:run_worker", PrefillOptions, "run one prefill worker", "serve", _WORKER),
    Command("decode", "worker:run_worker", DecodeOptions, "run one decode worker", "serve", _WORKER),
    Command("router", "router:run_router", RouterOptions, "run the router (smg) in front of running workers", "router"),
    Command("up", "cluster:run_up", UpOptions, "run workers and router together on this machine", "serve", _UP),
    Command(
        "demo", "demo:run_demo", DemoOptions,
        "stream three answers through a prefill worker, a decode worker and the router, and check every token",
        "demo", (*_UP, "rich"),
    ),
    Command(
        "rooms", "rooms:run_rooms", RoomsOptions, "show what workers hand over now, and their open rooms",
        "cli", ("rich",),
    ),
    Command(
        "fence", "fence:run_fence", FenceOptions,
        "confirm to workers that the processes of a lost host have ended, so that they release quarantined pages",
    ),
    Command(
        "doctor", "doctor:run_doctor", DoctorOptions,
        "report which transports can run here, which one `auto` would choose, and what is missing",
    ),
    Command(
        "completion", "completion:run_completion", CompletionOptions,
        "print a script that completes commands and options in bash, zsh or tcsh", "cli", ("shtab",),
    ),
    SOAK,
)  # fmt: skip


class Invocation(NamedTuple):
    """A parsed command line."""

    command: Command
    """The command to run."""
    options: Any
    """Its options: a struct of the type `command.options`."""


class Built(NamedTuple):
    """The parsers of the whole command line."""

    top: _Parser
    """The parser of `kvroom` itself."""
    commands: dict[str, _Parser]
    """The parser of each command."""


class _HelpFormatter(argparse.HelpFormatter):
    """Help formatter that lists the options of all transports below `--transport-option`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.dest == "transport_option":
            # Transports take long to import: import them only when this help is printed.
            listing: str = importlib.import_module("kvroom.transports.selection.options").in_words()
            return f"{action.help}. {listing.replace('%', '%%')}"
        return action.help


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line: the usage of a command with forty options would hide the error above it."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and `message`."""
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def parse(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Invocation:
    """Parse a command line; None stands for the arguments and the environment of this process.

    An option that is not given takes the value of its variable (see `kvroom.cli.variables`), or else its default.

    An invalid one raises `SystemExit` with status 2; help and the version raise it with status 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    environ = os.environ if environ is None else environ
    built = build_parser()
    argv, rest = _split(argv)
    if not argv:
        built.top.print_help()
        built.top.exit()
    if not argv[0].startswith("-") and argv[0] not in built.commands:
        names = [command.name for command in COMMANDS]
        built.top.error(
            f"unknown command {argv[0]!r}{_suggestion(argv[0], names) or ': use one of ' + ', '.join(names)}"
        )
    namespace, unknown = built.top.parse_known_args(argv)
    given = vars(namespace)
    if "command" not in given:
        built.top.error(f"unknown option {unknown[0]}: give a command first")
    command: Command = given.pop("command")
    parser = built.commands[command.name]
    if unknown:
        parser.error(_unknown(next((word for word in unknown if word != "--"), "--"), command))
    for option in options_of(command.options):
        try:
            value = None if option.name in given else read_variable(option, environ)
        except ConfigurationError as error:
            parser.error(str(error))
        if value is not None:
            given[option.name] = value
        elif option.default is msgspec.NODEFAULT and option.name not in given:
            parser.error(f"{option} is missing: give it, or set {variable_of(option)}")
    return Invocation(command, msgspec.convert({**given, **rest}, command.options))


def _split(argv: Sequence[str]) -> tuple[Sequence[str], dict[str, tuple[str, ...]]]:
    """Return the arguments of a command, and those after the first `--` by field name if the command passes them on."""
    taken = next((rest_of(command.options) for command in COMMANDS if argv and command.name == argv[0]), None)
    if taken is None or "--" not in argv:
        return argv, {}
    at = list(argv).index("--")
    return argv[:at], {taken.name: tuple(argv[at + 1 :])}


def without_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child whose options are all on its command line.

    Without this, `KVROOM_PORT` of `kvroom up` would be the port of its router and of each of its workers.
    """
    names = {variable_of(option) for command in COMMANDS for option in options_of(command.options)}
    return {name: value for name, value in environ.items() if name not in names}


def build_parser() -> Built:
    """Return the parser of `kvroom`, with one for each command."""
    top = _Parser(
        prog="kvroom",
        description="Serve a model with its prefill in one process and its decode in another.",
        epilog="`kvroom COMMAND --help` shows the options of a command. Start with `kvroom demo`.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"kvroom {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")
    built: dict[str, _Parser] = {}
    for command in COMMANDS:
        if command is SOAK:
            # With an impossible prefix character argparse sees no options here, so that every argument, --help too,
            # reaches the laboratory's parser.
            one = commands.add_parser(command.name, help=command.help, prefix_chars="\0", add_help=False)
        else:
            one = commands.add_parser(
                command.name,
                help=command.help,
                description=f"{command.help[0].upper()}{command.help[1:]}.",
                epilog=_epilog(command),
                formatter_class=_HelpFormatter,
                allow_abbrev=False,
            )
        one.set_defaults(command=command)
        places: dict[str, argparse._ActionsContainer] = {"": one}
        for option in options_of(command.options):
            title = option.flag.group
            if title not in places:
                places[title] = one.add_argument_group(title)
            _add(places[title], option)
        built[command.name] = one
    return Built(top, built)


def _epilog(command: Command) -> str:
    """Return the text below the options of a command."""
    text = (
        "Every option has a variable: --log-level, for example, is KVROOM_LOG_LEVEL. "
        "An option on the command line replaces its variable."
    )
    rest = rest_of(command.options)
    return text if rest is None else f"-- {rest.flag.form.metavar} ...: {rest.flag.help}. {text}"


def _add(place: argparse._ActionsContainer, option: CommandOption) -> None:
    """Add an option to a parser. Without a default, so that `parse` sees if the option was given."""
    form = option.flag.form
    more: dict[str, Any] = {"type": form.read, "metavar": form.metavar, "action": form.action, "nargs": form.nargs}
    if get_origin(option.hint) is Literal:
        more |= {"choices": get_args(option.hint)}
    elif option.hint is bool:
        more = {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    if option.flag.is_positional:
        place.add_argument(option.name, help=option.flag.help, default=argparse.SUPPRESS, **more)
        return
    help_text = option.flag.help
    if help_text != argparse.SUPPRESS and (shown := option.shown_default()):
        help_text += f" ({'required' if shown == 'required' else f'default: {shown}'})".replace("%", "%%")
    place.add_argument(str(option), help=help_text, default=argparse.SUPPRESS, **more)


def _unknown(word: str, command: Command) -> str:
    """Return the error for an argument that a command does not take."""
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    name = word.partition("=")[0]
    others = [other.name for other in COMMANDS if name in map(str, options_of(other.options))]
    if others:
        return f"{name} is an option of `kvroom {others[0]}`, not of `kvroom {command.name}`"
    return f"unknown option {name}{_suggestion(name, [str(option) for option in options_of(command.options)])}"


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else ""

"""`kvroom completion SHELL`: print a script that completes commands and options in a shell."""

from __future__ import annotations

import shtab

from .exit_status import ExitStatus
from .options import FILE, CompletionOptions, options_of
from .parser import COMMANDS, build_parser

_FILES = frozenset(
    str(option) for command in COMMANDS for option in options_of(command.options) if option.flag.form is FILE
)


def run_completion(options: CompletionOptions) -> int:
    """Print the script. To use it: `eval "$(kvroom completion bash)"`."""
    built = build_parser()
    for parser in built.commands.values():
        for action in parser._actions:  # noqa: SLF001 - argparse has no other list of the options of a parser
            if _FILES.intersection(action.option_strings):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # the attribute that shtab reads
    print(shtab.complete(built.top, shell=options.shell))
    return ExitStatus.DONE

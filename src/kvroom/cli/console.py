"""The console of rich, with the errors that the other commands have when the output cannot be written."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class OutputConsole(Console):
    """A console whose `BrokenPipeError` reaches `kvroom.cli.main`. rich itself would end the process with status 1."""

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error that is being handled."""
        raise

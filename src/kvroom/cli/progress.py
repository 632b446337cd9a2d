"""Progress of slow steps: a spinner with the current step on a terminal, plain lines elsewhere. Always on stderr.

Libraries that show bars of their own (tqdm) are told not to, here and in the processes that we start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Report = Callable[[str], None]


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show `title` and then each reported line until the block ends. Enter it before importing what is slow."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(title) as status:
            yield lambda line: status.update(f"{title}: {line}")
    else:
        print(title, file=sys.stderr, flush=True)
        yield lambda line: print(line, file=sys.stderr, flush=True)

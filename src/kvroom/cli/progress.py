"""Show the progress of slow steps on stderr: a spinner with the current step on a terminal, plain lines elsewhere.

The progress bars of libraries (tqdm) are disabled in this process and, by the environment, in those that it starts.
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
    """Show `title`, then each reported line, until the block ends.

    Enter the block before importing a library that uses tqdm, which reads TQDM_DISABLE at its import.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(title) as status:
            yield lambda line: status.update(f"{title}: {line}")
    else:
        print(title, file=sys.stderr, flush=True)
        yield lambda line: print(line, file=sys.stderr, flush=True)

"""Show the progress of slow steps on stderr: a spinner with the current step on a terminal, plain lines elsewhere.

Without the package rich there are plain lines on a terminal as well. The progress bars of libraries (tqdm) are disabled
in this process and, by the environment, in those that it starts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str], None]


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show `title`, then each reported line, until the block ends.

    Enter the block before importing a library that uses tqdm, which reads TQDM_DISABLE at its import.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    if sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        with Console(stderr=True).status(title) as status:
            yield lambda line: status.update(f"{title}: {line}")
    else:
        print(title, file=sys.stderr, flush=True)
        yield lambda line: print(line, file=sys.stderr, flush=True)

"""The line on stdout that says a process serves: `READY role key=value ...`, for people and for `kvroom up`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import NamedTuple

_WORD = "READY"


class Ready(NamedTuple):
    """Who is ready, and where: `url`, for a prefill worker `bootstrap_port`, the `model`'s name."""

    role: str
    facts: Mapping[str, str]

    def line(self) -> str:
        """As it is printed; values that hold spaces are quoted."""
        return shlex.join([_WORD, self.role, *(f"{key}={value}" for key, value in self.facts.items())])


def parse_ready(line: str) -> Ready | None:
    """The line read back, or None for any other line."""
    if not line.startswith(f"{_WORD} "):
        return None
    try:
        words = shlex.split(line)
    except ValueError:  # a quote without its end
        return None
    if len(words) < 2 or not all("=" in word for word in words[2:]):
        return None
    pairs = (word.partition("=") for word in words[2:])
    return Ready(words[1], {key: value for key, _, value in pairs})

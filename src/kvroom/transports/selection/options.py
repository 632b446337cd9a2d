"""The options of all transports together, as people read about them: for `--help` and for docs/transports.md."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvroom.transports import REGISTRY, options_of
from kvroom.transports.kit.options import Option, listed


def by_option() -> dict[Option, list[str]]:
    """Return the transports that have each option, in the order of the registry. The same option is there once."""
    found: dict[Option, list[str]] = {}
    for name in REGISTRY:
        for option in listed(options_of(name)):
            found.setdefault(option, []).append(name)
    return found


def without() -> list[str]:
    """Return the transports that have no option."""
    return [name for name in REGISTRY if not listed(options_of(name))]


def in_words() -> str:
    """Return the names and defaults of the options of each transport, in one sentence."""
    parts = [f"{name}: {', '.join(map(str, listed(options_of(name))))}" for name in REGISTRY if name not in without()]
    return "; ".join(parts)


def read_option(text: str) -> tuple[str, Any]:
    """Return the key and the value of `KEY=VALUE`, the value as JSON, or as it stands if it is none.

    Raises `argparse.ArgumentTypeError` for a text without a key or an equals sign.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value

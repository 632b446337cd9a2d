"""The options of all transports together, for `--help` and for docs/transports.md."""

from __future__ import annotations

from kvroom.transports import REGISTRY, options_of
from kvroom.transports.kit.options import Option, listed


def by_option() -> dict[Option, list[str]]:
    """Return each option once, with the transports that have it, in the order of the registry."""
    found: dict[Option, list[str]] = {}
    for name in REGISTRY:
        for option in listed(options_of(name)):
            found.setdefault(option, []).append(name)
    return found


def without() -> list[str]:
    """Return the transports that have no option."""
    return [name for name in REGISTRY if not listed(options_of(name))]


def in_words() -> str:
    """Return the names and defaults of each transport's options as one sentence."""
    parts = [f"{name}: {', '.join(map(str, listed(options_of(name))))}" for name in REGISTRY if name not in without()]
    return "; ".join(parts)

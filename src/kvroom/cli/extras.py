"""The packages that commands need beyond the library's own dependencies, by the extras of pyproject.toml."""

from __future__ import annotations

import importlib.util

from kvroom.errors import ConfigurationError

MODULES = {
    "cli": {"rich": "rich", "shtab": "shtab"},
    "metrics": {"prometheus_client": "prometheus-client"},
    "engine": {"torch": "torch", "transformers": "transformers", "jinja2": "jinja2"},
    "router": {"smg": "smg"},
}
"""For each extra, the packages by the module that is imported."""
CONTAINED = {"serve": ("cli", "engine", "metrics", "router"), "demo": ("serve",)}
"""For each extra, the extras that it includes. `demo` also has what converts the packaged model, which only a worker
that finds no converted model needs: see `kvroom.engine.weights`."""


def require(command: str, extra: str, *, only: tuple[str, ...] = ()) -> None:
    """Check that the packages of an extra are installed.

    Args:
        command: the command that needs them, for the message.
        extra: the extra.
        only: the modules of the extra that the command needs, if not all.

    Raises:
        ConfigurationError: some are missing; the text names them and the extra.
    """
    needed = _packages(extra)
    missing = [
        package
        for module, package in needed.items()
        if (not only or module in only) and importlib.util.find_spec(module) is None
    ]
    if missing:
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        raise ConfigurationError(
            f"`{command}` needs {names}, which kvroom's extra {extra!r} brings: install it as in "
            f"`pip install '.[{extra}]'` in a clone, or run `pip install {' '.join(missing)}`"
        )


def _packages(extra: str) -> dict[str, str]:
    found = dict(MODULES.get(extra, {}))
    for name in CONTAINED.get(extra, ()):
        found |= _packages(name)
    return found

"""`kvroom soak`: run the soak test of the laboratory, a package that is in kvroom's repository and in no wheel."""

from __future__ import annotations

import importlib
import importlib.util

from kvroom.errors import ConfigurationError

from .options import SoakOptions

_LABORATORY = "kvroom_lab"


def run_soak(options: SoakOptions) -> int:
    """Run the laboratory's command with all arguments. Raises `ConfigurationError` if it is not installed."""
    if importlib.util.find_spec(_LABORATORY) is None:
        raise ConfigurationError(
            "the soak is part of kvroom's laboratory, which is not installed: clone the repository of this version "
            "and run `pip install -e lab` in it"
        )
    status: int = importlib.import_module(f"{_LABORATORY}.soak.command").main(options.arguments)
    return status

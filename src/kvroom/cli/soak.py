"""`kvroom soak`: run the soak test of the laboratory, a package that is in kvroom's repository and in no wheel."""

from __future__ import annotations

import importlib
import importlib.util

from kvroom.errors import ConfigurationError, InvalidRequest, KVRoomError

from .options import SoakOptions
from .processes import ChildEnded

_LABORATORY = "kvroom_lab"


def run_soak(options: SoakOptions) -> int:
    """Run the laboratory's command with all arguments.

    Raises `ConfigurationError` if the laboratory is not installed or a setting is invalid, and `ChildEnded` if one of
    the two processes ended before it had reported.
    """
    if importlib.util.find_spec(_LABORATORY) is None:
        raise ConfigurationError(
            "the soak is part of kvroom's laboratory, which is not installed: clone the repository of this version "
            "and run `pip install -e lab` in it"
        )
    try:
        status: int = importlib.import_module(f"{_LABORATORY}.soak.command").main(options.arguments)
    except (ConfigurationError, InvalidRequest):
        raise
    except KVRoomError as error:
        raise ChildEnded(str(error)) from error
    return status

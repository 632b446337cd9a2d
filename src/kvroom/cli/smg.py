"""smg's own command line, with API keys that no list of processes shows.

smg takes its keys as arguments only, and every user of the machine can read the arguments of a process. So `kvroom
router` runs this module in its place: it appends the keys of the environment to the arguments within the process.
"""

from __future__ import annotations

import os
import runpy
import sys

from kvroom.network import load_api_keys


def key_arguments(keys: tuple[bytes, ...]) -> list[str]:
    """Return smg's arguments for these keys. With the first one it asks the workers itself; others are of tenants."""
    first = ["--api-key", keys[0].decode()] if keys else []
    others = [text for index, key in enumerate(keys[1:], 1) for text in ("--tenant-api-key", f"{index}:{key.decode()}")]
    return [*first, *others]


if __name__ == "__main__":
    sys.argv += key_arguments(load_api_keys(os.environ))
    runpy.run_module("smg.launch_router", run_name="__main__")

"""`python -m kvroom_lab.soak`: the same command as `kvroom soak`. It also starts its own two processes this way."""

from __future__ import annotations

import sys

from kvroom.errors import KVRoomError

from .command import main

try:
    sys.exit(main(sys.argv[1:]))
except KVRoomError as error:
    print(f"kvroom soak: error: {error}", file=sys.stderr)
    sys.exit(2)

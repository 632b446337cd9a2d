"""`python -m kvroom_lab.soak`: the same as `kvroom soak`, and how it starts its two processes."""

from __future__ import annotations

import sys

from kvroom.errors import KVRoomError

from .command import main

try:
    sys.exit(main(sys.argv[1:]))
except KVRoomError as error:
    print(f"kvroom soak: error: {error}", file=sys.stderr)
    sys.exit(2)

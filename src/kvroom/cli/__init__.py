"""The command line: `kvroom prefill | decode | router | up | demo | rooms | fence | doctor | soak`.

Every error of the user (a wrong option, a port in use, a missing file) ends as one line on stderr with exit status 2.
Only the commands that run a model import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvroom.errors import KVRoomError

from .parser import parse

INTERRUPTED_STATUS = 130
USAGE_STATUS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    The status is 0 for success, 2 for an error in what the user gave, and 130 if interrupted. Status 1 means that the
    command ran and its answer is no; each command documents the case.
    """
    command, options = parse(argv)
    try:
        return command(options)
    except KVRoomError as error:
        print(f"kvroom {command.name}: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    except KeyboardInterrupt:
        print(f"kvroom {command.name}: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS

"""The command line: `kvroom prefill | decode | router | up | demo | rooms | fence | doctor | soak`.

Whatever is wrong with what the user asked for ends in one line on stderr and exit status 2. torch is imported only by
the commands that run a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvroom.errors import KVRoomError

from .parser import parse

INTERRUPTED_STATUS = 130
USAGE_STATUS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 the command says what, 2 an error, 130 interrupted."""
    command, options = parse(argv)
    try:
        return command(options)
    except KVRoomError as error:
        print(f"kvroom {command.name}: error: {error}", file=sys.stderr)
        return USAGE_STATUS
    except KeyboardInterrupt:
        print(f"kvroom {command.name}: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS

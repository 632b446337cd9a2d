"""The command line: `kvroom prefill | decode | router | up | demo | rooms | fence | doctor | soak`.

Every error ends as one line on stderr; the exit status tells its kind (see `kvroom.cli.exit_status`). Only the commands
that run a model import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kvroom.errors import KVRoomError

from .exit_status import ExitStatus, status_for
from .parser import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, an `ExitStatus`."""
    command, options = parse(argv)
    try:
        return command(options)
    except KVRoomError as error:
        print(f"kvroom {command.name}: error: {error}", file=sys.stderr)
        return status_for(error)
    except KeyboardInterrupt:
        print(f"kvroom {command.name}: interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED

"""Run the command `kvroom` as `python -m kvroom`."""

import sys

from kvroom.cli import main

sys.exit(main())

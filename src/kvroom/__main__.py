"""`python -m kvroom` is the command `kvroom`."""

import sys

from kvroom.cli import main

sys.exit(main())

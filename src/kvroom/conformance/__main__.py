"""`python -m kvroom.conformance NAME`: run the checks over one transport; see `suite`."""

from __future__ import annotations

import sys

from .suite import main

sys.exit(main())

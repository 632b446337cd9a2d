"""What a machine can do for kvroom, and two machines together: `examine` and `between`. It starts nothing."""

from __future__ import annotations

from kvroom.transports.selection.choice import Row
from kvroom.transports.selection.doctor import (
    FORMAT,
    Between,
    Choice,
    Machine,
    Pairing,
    Report,
    between,
    examine,
)

__all__ = ["FORMAT", "Between", "Choice", "Machine", "Pairing", "Report", "Row", "between", "examine"]

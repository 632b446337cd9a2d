"""What a machine can do for kvroom, and two machines together: `examine` and `between`. It starts nothing."""

from __future__ import annotations

from kvroom.transports.selection.choice import TransportReport
from kvroom.transports.selection.doctor import (
    FORMAT,
    AutoChoice,
    Between,
    Machine,
    MachineReport,
    Pairing,
    between,
    examine,
)

__all__ = [
    "FORMAT",
    "AutoChoice",
    "Between",
    "Machine",
    "MachineReport",
    "Pairing",
    "TransportReport",
    "between",
    "examine",
]

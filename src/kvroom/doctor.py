"""Reports on the transports that a machine can use (`examine`), or two machines together (`between`).

Neither starts a manager or a server.
"""

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

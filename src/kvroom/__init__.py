"""kvroom hands the KV cache of an LLM request from the worker that prefilled it to the worker that decodes it.

Every engine needs the names below and `kvroom.plan.array_regions`; see the README for the thirty lines that it takes.
Some need more: `kvroom.runtime.agreement` (several ranks), `kvroom.runtime.secret` and `kvroom.runtime.link.LinkLimits`
(other hosts), `kvroom.status.server` (a window on the rooms), `kvroom.transports`.

A name is imported when it is first used. Plug-in mechanisms of other engines import a part of this package in every
process, and most of those processes use nothing of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvroom.bootstrap.http import KVBootstrapServer
    from kvroom.core.counts import Audit, Counters
    from kvroom.core.identity import KVIdentity
    from kvroom.core.phases import KVPoll
    from kvroom.core.settings import Limits, Timeouts
    from kvroom.errors import KVRoomError, LimitExceeded, LocalRoomError, PlanError, RoomFailed, RoomInUse
    from kvroom.plan import KVGroup, KVLayout, KVRegion, Parallel, Place, TokenSplit
    from kvroom.runtime.handles import HandOff, KVReceiver, KVSender
    from kvroom.runtime.manager import KVManager, RoomView

__all__ = [
    "Audit",
    "Counters",
    "HandOff",
    "KVBootstrapServer",
    "KVGroup",
    "KVIdentity",
    "KVLayout",
    "KVManager",
    "KVPoll",
    "KVReceiver",
    "KVRegion",
    "KVRoomError",
    "KVSender",
    "LimitExceeded",
    "Limits",
    "LocalRoomError",
    "Parallel",
    "Place",
    "PlanError",
    "RoomFailed",
    "RoomInUse",
    "RoomView",
    "Timeouts",
    "TokenSplit",
]

_MODULES = {
    "kvroom.bootstrap.http": ("KVBootstrapServer",),
    "kvroom.core.counts": ("Audit", "Counters"),
    "kvroom.core.identity": ("KVIdentity",),
    "kvroom.core.phases": ("KVPoll",),
    "kvroom.core.settings": ("Limits", "Timeouts"),
    "kvroom.errors": ("KVRoomError", "LimitExceeded", "LocalRoomError", "PlanError", "RoomFailed", "RoomInUse"),
    "kvroom.plan": ("KVGroup", "KVLayout", "KVRegion", "Parallel", "Place", "TokenSplit"),
    "kvroom.runtime.handles": ("HandOff", "KVReceiver", "KVSender"),
    "kvroom.runtime.manager": ("KVManager", "RoomView"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the module of a public name and keep the name here."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names, whether or not they were used yet."""
    return sorted({*globals(), *__all__})

"""kvroom hands the KV cache of an LLM request from the worker that prefilled it to the worker that decodes it.

This package exports the names that engines need; the README has an example of thirty lines. The engine, the adapters,
the servers and the commands of this project use only these names and these public modules:

    kvroom.errors       all errors; their texts name the remedy
    kvroom.network      read addresses, secrets and allow-lists from settings
    kvroom.http         HTTP servers and clients with limits
    kvroom.transports   the transports that move blocks, and the interface to write one
    kvroom.doctor       the transports that one machine, or two machines together, can use
    kvroom.status       the rooms of a manager over HTTP: routes, metrics, logs

For authors of transports there are also `kvroom.conformance` and `kvroom.transports.kit`.

A name is imported when it is first used. Plug-in mechanisms of other engines import a part of this package in every
process, and most of those processes do not use it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvroom.bootstrap.client import wait_until_up
    from kvroom.bootstrap.http import KVBootstrapServer
    from kvroom.core.causes import Cause
    from kvroom.core.counts import Audit, Counters, Ending
    from kvroom.core.identity import KVIdentity
    from kvroom.core.messages import RoomNumber
    from kvroom.core.phases import KVPoll, Phase
    from kvroom.core.settings import Limits, Timeouts
    from kvroom.core.trace import RequestTrace
    from kvroom.errors import KVRoomError, LimitExceeded, LocalRoomError, PlanError, RoomFailed, RoomInUse
    from kvroom.plan import KVGroup, KVLayout, KVRegion, Parallel, Place, TokenSplit, array_regions
    from kvroom.runtime.agreement import Agreement, AgreementError, Carrier, RankConsensus, TorchCarrier
    from kvroom.runtime.handles import ROOM_NUMBERS, Handle, KVReceiver, KVSender
    from kvroom.runtime.link import LinkLimits
    from kvroom.runtime.machine_id import load_machine
    from kvroom.runtime.manager import FencedPeer, KVManager
    from kvroom.runtime.measure import LATENCY_BOUNDS_S, HandOff, Metrics
    from kvroom.runtime.secret import load_secret
    from kvroom.runtime.views import RoomView
    from kvroom.wire.aux_message import Aux, decode_aux, encode_aux

__version__ = "0.1.0"
"""The version of this package."""

__all__ = [
    "LATENCY_BOUNDS_S",
    "ROOM_NUMBERS",
    "Agreement",
    "AgreementError",
    "Audit",
    "Aux",
    "Carrier",
    "Cause",
    "Counters",
    "Ending",
    "FencedPeer",
    "HandOff",
    "Handle",
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
    "LinkLimits",
    "LocalRoomError",
    "Metrics",
    "Parallel",
    "Phase",
    "Place",
    "PlanError",
    "RankConsensus",
    "RequestTrace",
    "RoomFailed",
    "RoomInUse",
    "RoomNumber",
    "RoomView",
    "Timeouts",
    "TokenSplit",
    "TorchCarrier",
    "__version__",
    "array_regions",
    "decode_aux",
    "encode_aux",
    "load_machine",
    "load_secret",
    "wait_until_up",
]

_MODULES = {
    "kvroom.bootstrap.client": ("wait_until_up",),
    "kvroom.bootstrap.http": ("KVBootstrapServer",),
    "kvroom.core.causes": ("Cause",),
    "kvroom.core.counts": ("Audit", "Counters", "Ending"),
    "kvroom.core.identity": ("KVIdentity",),
    "kvroom.core.messages": ("RoomNumber",),
    "kvroom.core.phases": ("KVPoll", "Phase"),
    "kvroom.core.settings": ("Limits", "Timeouts"),
    "kvroom.core.trace": ("RequestTrace",),
    "kvroom.errors": ("KVRoomError", "LimitExceeded", "LocalRoomError", "PlanError", "RoomFailed", "RoomInUse"),
    "kvroom.plan": ("KVGroup", "KVLayout", "KVRegion", "Parallel", "Place", "TokenSplit", "array_regions"),
    "kvroom.runtime.agreement": ("RankConsensus", "Agreement", "AgreementError", "Carrier", "TorchCarrier"),
    "kvroom.runtime.handles": ("ROOM_NUMBERS", "Handle", "KVReceiver", "KVSender"),
    "kvroom.runtime.link": ("LinkLimits",),
    "kvroom.runtime.machine_id": ("load_machine",),
    "kvroom.runtime.manager": ("FencedPeer", "KVManager"),
    "kvroom.runtime.measure": ("LATENCY_BOUNDS_S", "HandOff", "Metrics"),
    "kvroom.runtime.secret": ("load_secret",),
    "kvroom.runtime.views": ("RoomView",),
    "kvroom.wire.aux_message": ("Aux", "decode_aux", "encode_aux"),
}


def _lazily(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that exports these names of these modules.

    A name is imported on first access, and then stored in the package, so that later accesses cost nothing extra.
    """
    homes = {name: module for module, names in modules.items() for name in names}
    kept = vars(sys.modules[package])

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found: object = getattr(importlib.import_module(homes[name]), name)
        kept[name] = found
        return found

    return get, lambda: sorted({*kept, *homes})


__getattr__, __dir__ = _lazily(__name__, _MODULES)

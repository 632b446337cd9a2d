"""kvroom hands the KV cache of an LLM request from the worker that prefilled it to the worker that decodes it.

An engine needs the names below and nothing else; see the README for the thirty lines that it takes.
"""

from kvroom.bootstrap.http import KVBootstrapServer
from kvroom.core.counts import Audit, Counters
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

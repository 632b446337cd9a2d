"""Values that stand for a room table: equal values mean equal behaviour, whatever attributes a table or room has.

`exact` keeps times and numbers. `alike` tells times from now on and leaves out what no rule reads: how messages are
numbered, and the texts that say why a room failed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import Any

import msgspec

from kvroom.core.messages import Message
from kvroom.core.room import Room
from kvroom.core.table import RoomTable

_NOT_STATE = frozenset(
    {
        "timeouts",
        "limits",
        "_timeouts",
        "_limits",
        "_bytes",
        "_all_bytes",
        "counters",
        "owner",
        "outbox",
        "history",
        "_effects",
    }
)
_NOT_READ = frozenset(
    {"took_s", "ready_at", "aux", "_peer_identity", "seat", "last_seq", "_census", "_quarantined_pages"}
)


def exact(table: RoomTable) -> Hashable:
    """Equal for two tables only if they are equal in everything but counters."""
    return _frozen(table, None)


def alike(table: RoomTable, now: float) -> Hashable:
    """Equal for two tables that behave alike towards everybody who numbers messages afresh."""
    return _frozen(table, now)


def alike_message(message: Message) -> Hashable:
    """What a receiver's rules read of a message: everything but how it words a failure and how long something took."""
    fields = [(name, getattr(message, name)) for name in message.__struct_fields__ if name != "took_s"]
    return type(message), tuple(value is None if name == "failure" else value for name, value in fields)


def _frozen(value: Any, now: float | None) -> Hashable:
    """With `now`: alike, each time as the time from now on. The explorer's are quarters of a second: nothing rounds."""
    if isinstance(value, float):
        return value if now is None else value - now
    if isinstance(value, Room):
        assert isinstance(value.listener, Hashable)
        return value.listener  # which room it is; what it is like is told once, where the table is
    if isinstance(value, RoomTable):
        rooms = tuple(_fields(vars(room), now) for room in value)
        return _fields(vars(value), now), rooms
    if isinstance(value, dict):
        items = ((_frozen(key, now), _frozen(item, now)) for key, item in value.items())
        return tuple(items) if isinstance(value, OrderedDict) else frozenset(items)
    if isinstance(value, list | tuple):
        return tuple(_frozen(item, now) for item in value)
    if isinstance(value, set):
        return frozenset(_frozen(item, now) for item in value)
    if isinstance(value, msgspec.Struct):
        return value if now is None or not hasattr(value, "failure") else alike_message(value)  # type: ignore[arg-type]
    if isinstance(value, Enum) or not type(value).__module__.startswith("kvroom"):
        return value  # type: ignore[no-any-return]  # numbers, strings, frozen sets
    return _fields({name: getattr(value, name) for name in getattr(value, "__slots__", None) or vars(value)}, now)


def _fields(named: Mapping[str, Any], now: float | None) -> Hashable:
    if now is None:
        return tuple((name, _frozen(item, None)) for name, item in named.items() if name not in _NOT_STATE)
    return tuple(
        (name, (item is None) if name == "failure" else _frozen(item, now))
        for name, item in named.items()
        if name not in _NOT_STATE and name not in _NOT_READ
    )

"""Hashable keys of a room table: equal keys mean equal behaviour, whatever attributes a table or a room has.

`exact_key` keeps times and numbers. `behaviour_key` makes times relative to now and leaves out what no rule reads: how
messages are numbered, and the texts that explain a failure.
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


def exact_key(table: RoomTable) -> Hashable:
    """Return a key that two tables share only if they are equal in everything but counters."""
    return _frozen(table, None)


def behaviour_key(table: RoomTable, now: float) -> Hashable:
    """Return a key that two tables share if they behave the same towards peers that number their messages from 1."""
    return _frozen(table, now)


def message_key(message: Message) -> Hashable:
    """Return what a receiver's rules read of a message: all but the text of a failure and how long something took."""
    fields = [(name, getattr(message, name)) for name in message.__struct_fields__ if name != "took_s"]
    return type(message), tuple(value is None if name == "failure" else value for name, value in fields)


def _frozen(value: Any, now: float | None) -> Hashable:
    """Return a hashable form of a value; with `now`, every time is relative to it.

    The times of the explorer are multiples of a quarter of a second, so subtracting them is exact.
    """
    if isinstance(value, float):
        return value if now is None else value - now
    if isinstance(value, Room):
        assert isinstance(value.listener, Hashable)
        return value.listener  # identifies the room; its state occurs once, at its table
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
        return value if now is None or not hasattr(value, "failure") else message_key(value)  # type: ignore[arg-type]
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

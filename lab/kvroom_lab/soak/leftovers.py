"""A search for what a process still keeps of its rooms, by walking its objects instead of asking the table.

The walk begins at all modules, at the local variables of the other threads and, after these, at everything that the
garbage collector tracks, and follows every reference. An object that refers to an int which is a room number or
generation of the soak, or to a text that contains one, holds an entry: a dict (key or value), set, list, deque, tuple,
object, closure. The walk also counts the rooms and handles that are still alive. It takes a second and some MiB.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from kvroom.core.room import Room
from kvroom.runtime.handles import Handle

_ATOMS = (int, float, complex, bool, bytes, bytearray, type(None), range)
_NUMBER = re.compile(r"\d{18,20}")
_NAMED = 20
_STEPS = 12


class Leftovers(msgspec.Struct):
    """`entries` in containers and objects, `alive` rooms and handles; `where` names the first of them."""

    entries: int = 0
    alive: int = 0
    walked: int = 0
    where: list[str] = []


class _Seen(NamedTuple):
    """An object of the walk, and the id of the object from which it was first reached (None: a root)."""

    what: object
    whence: int | None


def find_leftovers(owns: Callable[[int], bool]) -> Leftovers:
    """Collect garbage, then walk this process. `owns` decides whether an int is a number of the soak."""
    gc.collect()
    found = Leftovers(where=[])
    seen: dict[int, _Seen] = {}
    rest = gc.get_objects()  # taken now, so that it contains nothing of the walk itself
    own = _own_frames()
    for roots in ([_Locals(), sys.modules], rest):
        queue: deque[_Seen] = deque(_Seen(root, None) for root in roots)
        while queue:
            one = queue.popleft()
            if id(one.what) in seen or id(one.what) in own or one.what is rest:
                continue
            seen[id(one.what)] = one
            entries = _entries(one.what, owns, queue)
            alive = issubclass(type(one.what), Room | Handle)  # isinstance would call the object's `__class__`
            found.entries += entries
            found.alive += alive
            if (entries or alive) and len(found.where) < _NAMED:
                found.where.append(f"{entries} in {_path(one, seen, owns)}")
    found.walked = len(seen)
    return found


def _entries(holder: object, owns: Callable[[int], bool], queue: deque[_Seen]) -> int:
    """Return how many of its references are numbers of the soak; queue the other objects that it refers to."""
    entries = 0
    for one in _referents(holder):
        if type(one) is int:
            entries += one > 0xFFFFFFFF and owns(one)
        elif type(one) is str:
            entries += _names_one(one, owns)
        elif type(one) not in _ATOMS:
            queue.append(_Seen(one, id(holder)))
    return entries


def _referents(holder: object) -> Iterable[object]:
    if type(holder) is _Locals:
        return holder.values
    referents = gc.get_referents(holder)
    if not issubclass(type(holder), dict):
        return referents
    # A dict whose keys are all texts does not show them to the collector, and an OrderedDict shows every key twice.
    entries: dict[object, object] = holder  # type: ignore[assignment]
    others = (one for one in referents if type(one) not in (*_ATOMS, str))
    return [*dict.keys(entries), *dict.values(entries), *others]


def _names_one(text: str, owns: Callable[[int], bool]) -> bool:
    return len(text) >= 18 and any(owns(int(digits)) for digits in _NUMBER.findall(text))


class _Locals:
    """The local variables of every running function of the other threads, to which no object refers."""

    def __init__(self) -> None:
        self.values: list[object] = []
        for thread, top in sys._current_frames().items():  # noqa: SLF001 - documented, despite its name
            frame: types.FrameType | None = top if thread != threading.get_ident() else None
            while frame is not None:
                self.values.append({f"{frame.f_code.co_name}:{key}": value for key, value in frame.f_locals.items()})
                frame = frame.f_back


def _own_frames() -> frozenset[int]:
    """Return the ids of the frames of the caller and its callers: what they hold belongs to the walk.

    Ids only: a frame stored in one of its own local variables would keep itself alive, and everything that the walk has
    seen with it.
    """
    ids: set[int] = set()
    frame = sys._getframe().f_back  # noqa: SLF001 - documented, despite its name
    while frame is not None:
        ids.add(id(frame))
        frame = frame.f_back
    return frozenset(ids)


def _path(one: _Seen, seen: dict[int, _Seen], owns: Callable[[int], bool]) -> str:
    """Return the types from the object up to the root that keeps it alive, with names where there are any."""
    steps = [type(one.what).__qualname__ + _name(one.what, lambda value: type(value) is int and owns(value))]
    while one.whence is not None and len(steps) < _STEPS:
        child, one = one.what, seen[one.whence]
        steps.append(type(one.what).__qualname__ + _name(one.what, lambda value, child=child: value is child))  # type: ignore[misc]
    return " < ".join(steps)


def _name(holder: object, wanted: Callable[[object], bool]) -> str:
    """Return the holder's name for the wanted object: `.attribute` or `[key]`; "" if none is found."""
    if issubclass(type(holder), dict):
        entries: dict[object, object] = holder  # type: ignore[assignment]
        return next((f"[{key}]" for key, value in entries.items() if type(key) is str and wanted(value)), "")
    return next((f".{key}" for key, value in getattr(holder, "__dict__", {}).items() if wanted(value)), "")

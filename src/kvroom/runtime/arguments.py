"""Arguments of an engine's calls, checked before anything is posted to the manager's thread.

A room's numbers travel as msgpack integers and its metadata as bytes. A NumPy integer, a float or a text that came
through would fail there, in the thread that serves every room, so it is converted or refused in the engine's own call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from kvroom.core.messages import MAX_AUX_BYTES, Window
from kvroom.dialling.allowed import AllowList
from kvroom.errors import ConfigurationError, LocalRoomError
from kvroom.plan.ranks import Place
from kvroom.wire.address import parse_address

COUNT_END = 2**63
"""Room numbers and token counts are below this: what a signed 64-bit integer holds."""


def as_count(value: Any, name: str) -> int:
    """Return `value` as an int in [0, 2**63). It may be any integer type, such as NumPy's; `LocalRoomError` if not."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if isinstance(value, bool) or not 0 <= count < COUNT_END:
        raise LocalRoomError(f"{name} is {value!r}: give an int of at least 0, below 2**63")
    return count


def as_flag(value: Any, name: str) -> bool:
    """Return `value` as a bool. NumPy's is one, too; an int or a text is refused with `LocalRoomError`."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise LocalRoomError(f"{name} is {value!r}: give True or False")
    return bool(value)


def as_pages(pages: Any, name: str = "pages") -> tuple[int, ...]:
    """Return page numbers as a tuple of ints. Any flat sequence of integers will do, a NumPy array or tensor too.

    Raises `LocalRoomError` for anything else. The numbers are compared with the pool later, by the plan.
    """
    if hasattr(pages, "tolist"):
        pages = pages.tolist()
    if isinstance(pages, str | bytes | bytearray | Mapping) or not isinstance(pages, Iterable):
        raise LocalRoomError(f"{name} is {_shown(pages)}: give a flat sequence of page numbers")
    found = tuple(pages)
    if set(map(type, found)) <= {int} and min(found, default=0) >= 0:
        return found  # what most engines give, at a small part of the cost of looking at each number
    return tuple(as_count(page, f"a page number in {name}") for page in found)


def as_place(place: Any) -> Place:
    """Return a rank's coordinates as ints, which travel to the directory. `LocalRoomError` unless they are four."""
    if not isinstance(place, tuple) or len(place) != len(Place._fields):
        raise LocalRoomError(f"place is {_shown(place)}: give Place(dp, cp, tp, pp)")
    return Place(*(as_count(rank, f"{axis} of place") for axis, rank in zip(Place._fields, place, strict=True)))


def as_windows(windows: Any) -> tuple[Window, ...]:
    """Return the page lists of further groups, {group: pages}, as they travel. `LocalRoomError` if it is no mapping."""
    if windows is None:
        return ()
    if not isinstance(windows, Mapping) or not all(isinstance(group, str) for group in windows):
        raise LocalRoomError(f"windows is {_shown(windows)}: give a mapping of group names to page numbers")
    return tuple(Window(group, as_pages(pages, f"windows[{group!r}]")) for group, pages in sorted(windows.items()))


def as_aux(aux: Any) -> bytes:
    """Return metadata as bytes. `LocalRoomError` for anything but bytes, and for more than 1 MiB."""
    if not isinstance(aux, bytes | bytearray | memoryview):
        raise LocalRoomError(f"aux is {_shown(aux)}: give bytes")
    data = bytes(aux)
    if len(data) > MAX_AUX_BYTES:
        raise LocalRoomError(f"aux has {len(data)} bytes, and the limit is {MAX_AUX_BYTES}: send less with the room")
    return data


def check_directory(bootstrap_addr: str, allowed: AllowList) -> None:
    """Raise `LocalRoomError` for an invalid address, `AddressNotAllowed` for one that is not on the list."""
    if not isinstance(bootstrap_addr, str):
        raise LocalRoomError(f"bootstrap_addr is {bootstrap_addr!r}: give the directory's address, host:port")
    try:
        allowed.check(parse_address(bootstrap_addr))
    except ConfigurationError as error:
        raise LocalRoomError(f"bootstrap_addr: {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__}, {text if len(text) <= 80 else text[:80] + '...'}"

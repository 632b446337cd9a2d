"""Checks of the arguments of an engine's calls, before anything is posted to the manager's thread.

A room's numbers travel as msgpack integers and its metadata as bytes. A NumPy integer, a float or a text would raise
only in the loop thread, which serves every room. It is therefore converted or refused in the engine's own call.
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
"""Upper end of room numbers and token counts: one more than the largest signed 64-bit integer."""


def as_count(value: Any, name: str) -> int:
    """Return `value`, of any integer type such as NumPy's, as an int in [0, 2**63); else raise `LocalRoomError`."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if isinstance(value, bool) or not 0 <= count < COUNT_END:
        raise LocalRoomError(f"{name} is {value!r}: give an int of at least 0, below 2**63")
    return count


def as_flag(value: Any, name: str) -> bool:
    """Return `value`, a bool of Python or NumPy, as a bool; raise `LocalRoomError` for an int, a text, or another."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise LocalRoomError(f"{name} is {value!r}: give True or False")
    return bool(value)


def as_pages(pages: Any, name: str = "pages") -> tuple[int, ...]:
    """Return page numbers, from any flat sequence of integers, NumPy array or tensor, as a tuple of ints.

    Raises `LocalRoomError` for anything else. The plan compares the numbers with the size of the pool later.
    """
    if hasattr(pages, "tolist"):
        pages = pages.tolist()
    if isinstance(pages, str | bytes | bytearray | Mapping) or not isinstance(pages, Iterable):
        raise LocalRoomError(f"{name} is {_shown(pages)}: give a flat sequence of page numbers")
    found = tuple(pages)
    if set(map(type, found)) <= {int} and min(found, default=0) >= 0:
        return found  # the common case, at a small part of the cost of checking each number separately
    return tuple(as_count(page, f"a page number in {name}") for page in found)


def as_place(place: Any) -> Place:
    """Return the four coordinates of a rank as ints, which travel to the directory; else raise `LocalRoomError`."""
    if not isinstance(place, tuple) or len(place) != len(Place._fields):
        raise LocalRoomError(f"place is {_shown(place)}: give Place(dp, cp, tp, pp)")
    return Place(*(as_count(rank, f"{axis} of place") for axis, rank in zip(Place._fields, place, strict=True)))


def as_windows(windows: Any) -> tuple[Window, ...]:
    """Return the page lists of further groups, sorted by name, from a mapping; else raise `LocalRoomError`."""
    if windows is None:
        return ()
    if not isinstance(windows, Mapping) or not all(isinstance(group, str) for group in windows):
        raise LocalRoomError(f"windows is {_shown(windows)}: give a mapping of group names to page numbers")
    return tuple(Window(group, as_pages(pages, f"windows[{group!r}]")) for group, pages in sorted(windows.items()))


def as_aux(aux: Any) -> bytes:
    """Return metadata as bytes; raise `LocalRoomError` for another type, and for more than 1 MiB."""
    if not isinstance(aux, bytes | bytearray | memoryview):
        raise LocalRoomError(f"aux is {_shown(aux)}: give bytes")
    data = bytes(aux)
    if len(data) > MAX_AUX_BYTES:
        raise LocalRoomError(
            f"aux has {len(data)} bytes, and the limit is {MAX_AUX_BYTES}: send less metadata with the room"
        )
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

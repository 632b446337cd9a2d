"""The name of a request: which ids and traceparents are kept."""

from __future__ import annotations

import pytest

from kvroom.core.trace import RequestTrace
from kvroom.errors import LocalRoomError

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("name", ["a", "x" * 128, "cmpl-1/2:3", "!~"])
def test_visible_ascii_is_an_id(name: str) -> None:
    assert RequestTrace(name, PARENT).checked() == (name, PARENT)


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "\n", "a\x7f", "caf\xe9", 7, None, ["a"]])
def test_anything_else_is_none(name: object) -> None:
    assert not RequestTrace.is_id(name)
    with pytest.raises(LocalRoomError, match=r"invalid request id .*: give 1 to 128 visible ASCII characters"):
        RequestTrace(name).checked()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (PARENT, PARENT),
        ("00" + PARENT[2:-2] + "ff", "00" + PARENT[2:-2] + "ff"),
        ("cc" + PARENT[2:], "cc" + PARENT[2:]),
        ("cc" + PARENT[2:] + "-what-comes-later", "cc" + PARENT[2:]),
        (PARENT + "-more", None),  # version 00 has four fields
        ("cc" + PARENT[2:] + "more", None),
        ("ff" + PARENT[2:], None),
        (PARENT.upper(), None),
        (PARENT[:-1], None),
        (PARENT + "\n", None),
        (" " + PARENT, None),
        ("00-" + "0" * 32 + PARENT[35:], None),
        (PARENT[:36] + "0" * 16 + "-01", None),
        ("", None),
    ],
)
def test_a_traceparent_is_kept_if_it_is_valid(text: str, kept: str | None) -> None:
    assert RequestTrace.read_traceparent(text) == kept


def test_an_invalid_traceparent_is_named() -> None:
    with pytest.raises(LocalRoomError, match="invalid traceparent 'x': give VERSION-TRACEID-PARENTID-FLAGS"):
        RequestTrace("a", "x").checked()

"""Arguments of an engine's calls: the accepted forms of numbers, page lists and metadata, and the refused ones."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from kvroom import LocalRoomError
from kvroom.core.messages import MAX_AUX_BYTES, Window
from kvroom.plan import Place
from kvroom.runtime.arguments import as_aux, as_count, as_flag, as_pages, as_place, as_windows


class Index:
    """An integer of another library."""

    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), np.array(7), Index()])
def test_any_integer_is_a_count(value: Any) -> None:
    count = as_count(value, "stop")
    assert (count, type(count)) == (7, int)


@pytest.mark.parametrize(
    "value", [-1, 2**63, 2**70, 7.0, np.float32(7), "7", b"7", None, True, np.array([7, 8]), [7], float("nan")]
)
def test_what_is_no_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(LocalRoomError, match=r"stop is .*: give an int of at least 0, below 2\*\*63"):
        as_count(value, "stop")


@pytest.mark.parametrize(
    "pages",
    [[3, 0, 9], (3, 0, 9), np.array([3, 0, 9]), np.array([3, 0, 9], np.uint16), array("i", [3, 0, 9]),
     [np.int32(3), 0, np.int64(9)], {3: "a", 0: "b", 9: "c"}.keys()],
)  # fmt: skip
def test_any_flat_sequence_of_integers_is_a_page_list(pages: Any) -> None:
    found = as_pages(pages)
    assert found == (3, 0, 9)
    assert {type(page) for page in found} == {int}


@pytest.mark.parametrize("pages", [range(3), np.arange(3)])
def test_a_range_of_pages(pages: Any) -> None:
    assert as_pages(pages) == (0, 1, 2)


@pytest.mark.parametrize(
    "pages",
    ["12", b"12", 5, None, np.array(5), [1.0], [None], [[1]], np.zeros((2, 2), int), {1: 2}, ["1"], [-1], [True]],
)
def test_what_is_no_page_list_is_refused(pages: Any) -> None:
    with pytest.raises(LocalRoomError, match=r"give (a flat sequence of page numbers|an int of at least 0)"):
        as_pages(pages)


@pytest.mark.parametrize("aux", [b"first", bytearray(b"first"), memoryview(b"first")])
def test_metadata_is_bytes(aux: Any) -> None:
    assert as_aux(aux) == b"first"


@pytest.mark.parametrize("aux", ["first", 5, None, [1, 2], {"token": 5}, np.frombuffer(b"first", "u1")])
def test_metadata_of_another_type_is_refused(aux: Any) -> None:
    with pytest.raises(LocalRoomError, match=rf"aux is a {type(aux).__name__}, .*: give bytes"):
        as_aux(aux)


def test_more_metadata_than_travels_is_refused() -> None:
    assert len(as_aux(bytes(MAX_AUX_BYTES))) == MAX_AUX_BYTES
    with pytest.raises(LocalRoomError, match="aux has 1048577 bytes, and the limit is 1048576"):
        as_aux(bytes(MAX_AUX_BYTES + 1))


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (np.int64(0), np.uint8(1), np.array(2), Index())])
def test_coordinates_are_any_integers(ranks: tuple[Any, ...]) -> None:
    place = as_place(Place(*ranks))
    assert all(type(rank) is int for rank in place)
    assert place[:3] == (0, 1, 2)


@pytest.mark.parametrize(
    "place", [(0, 0, 0), [0, 0, 0, 0], 5, (0, 0, 0, "1"), (0, 0, 0, -1), (0, 0, 0, 1.0), (0, 0, 0, True)]
)
def test_what_is_no_place_is_refused(place: Any) -> None:
    with pytest.raises(LocalRoomError, match="place"):
        as_place(place)


def test_windows_are_page_lists_by_group() -> None:
    assert as_windows(None) == as_windows({}) == ()
    assert as_windows({"swa": np.array([2, 1]), "conv": [0]}) == (Window("conv", (0,)), Window("swa", (2, 1)))


@pytest.mark.parametrize("windows", [[("swa", [1])], "swa", {1: [1]}, 5])
def test_windows_of_another_type_are_refused(windows: Any) -> None:
    with pytest.raises(LocalRoomError, match=r"windows is .*: give a mapping of group names to page numbers"):
        as_windows(windows)


@pytest.mark.parametrize(
    ("value", "flag"), [(True, True), (False, False), (np.bool_(True), True), (np.bool_(False), False)]
)
def test_a_flag_is_true_or_false(value: Any, flag: bool) -> None:
    assert as_flag(value, "last") is flag


@pytest.mark.parametrize("value", [1, 0, "no", None, np.int8(1), []])
def test_anything_else_is_no_flag(value: Any) -> None:
    with pytest.raises(LocalRoomError, match=r"last is .*: give True or False"):
        as_flag(value, "last")

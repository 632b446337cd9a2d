"""`/rooms` and `/rooms/{id}` of real workers: the open rooms, what each waits for, and since when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .conftest import Served
from .helpers import begin_post, finish, look
from .test_contract import PATH, body_for, error_of


@contextmanager
def waiting_room(served: Served) -> Iterator[int]:
    """Open a room that no decode worker joins, before the block begins; after the block it has ended."""
    body = body_for(served)
    with begin_post(served.prefill, PATH, body) as connection:
        look(served.prefill, "/rooms?phase=EXPECTED&within_s=10")
        yield body["bootstrap_room"]
        assert finish(connection).status == 503


def test_one_room_tells_its_story(served: Served) -> None:
    with waiting_room(served) as room:
        response = look(served.prefill, f"/rooms/{room}")
        assert response.status == 200
        said = response.json()
        assert said["room"] == room
        (view,) = said["views"]
        assert (view["room"], view["side"], view["phase"]) == (room, "prefill", "EXPECTED")
        assert view["waits_for"] == "a decode worker to offer pages"
        assert 0 < view["waits_until_s"] <= 3
        ((phase, ago_s),) = view["timeline"]
        assert phase == "EXPECTED"
        assert 0 <= ago_s < 10
        later = look(served.prefill, f"/rooms/{room}").json()["views"][0]
        assert later["timeline"][-1][1] > ago_s
        assert look(served.decode, f"/rooms/{room}").status == 404
    # A failed room is kept until its decode worker can have learned the cause, and then forgotten.
    assert look(served.prefill, "/rooms?idle_within_s=10").status == 200
    gone = look(served.prefill, f"/rooms/{room}")
    assert gone.status == 404
    assert error_of(gone).startswith(f"room {room} is not open on this worker")
    assert "or it has ended and is forgotten" in error_of(gone)


BAD_NUMBERS = ["-1", "+1", "x", "1.5", "1e3", "1_0", "007", "%20", "%201", "1%0a", "%D9%A1", "%EF%BC%95", "%FF", "%00"]


@pytest.mark.parametrize("text", [*BAD_NUMBERS, str(2**63), "9" * 400, "9" * 5000])
def test_what_is_no_room_number_is_refused(served: Served, text: str) -> None:
    response = look(served.decode, f"/rooms/{text}")
    assert response.status == 400
    assert "give a whole number in [0, 2**63)" in error_of(response)
    assert len(response.text) < 500


def test_the_highest_number_is_one(served: Served) -> None:
    assert look(served.decode, f"/rooms/{2**63 - 1}").status == 404


def test_the_oldest_rooms_are_told_with_the_number_of_all(served: Served) -> None:
    with waiting_room(served) as first, waiting_room(served):
        said: dict[str, Any] = look(served.prefill, "/rooms?oldest=1").json()
        assert said["kept"] == 2
        assert [view["room"] for view in said["open"]] == [first]
        assert said["pool"]["pages"] == 128
        assert "rooms" not in said  # `oldest` avoids counting all rooms
        assert [view["room"] for view in look(served.prefill, f"/rooms/{first}").json()["views"]] == [first]


@pytest.mark.parametrize(
    "text", [*BAD_NUMBERS, "", "0", "10001", "0000000001000", "0" * 5000 + "1", "00000000019999999", "9" * 5000]
)
def test_a_number_of_rooms_that_is_none_is_refused(served: Served, text: str) -> None:
    response = look(served.decode, f"/rooms?oldest={text}")
    assert response.status == 400
    assert "give a whole number in [1, 10000]" in error_of(response)


@pytest.mark.parametrize(
    "text",
    [*(text for text in BAD_NUMBERS if text != "1.5"), "", "0", "0.0", "61", "inf", "nan", ".5", "5.", "9" * 5000],
)
def test_seconds_that_are_none_are_refused(served: Served, text: str) -> None:
    for query in (f"idle_within_s={text}", f"phase=SENDING&within_s={text}"):
        response = look(served.decode, f"/rooms?{query}")
        assert response.status == 400
        assert "give seconds in (0, 60]" in error_of(response)


def test_rooms_are_told_as_before(served: Served) -> None:
    with waiting_room(served) as room:
        said = look(served.prefill, "/rooms").json()
        assert said["rooms"]["sources"] == 1
        assert [view["room"] for view in said["open"]] == [room]
        assert set(said) >= {"waiting", "running", "parting", "succeeded", "failed", "pool", "error", "peers"}

"""`GET /rooms?phase=P&within_s=N` waits until a worker has a room in that phase."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import Served
from .helpers import begin_post, look
from .test_contract import PATH, body_for


def test_it_answers_when_a_room_comes_to_the_phase(served: Served) -> None:
    body = body_for(served)
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(look, served.prefill, "/rooms?phase=EXPECTED&within_s=20")
        with begin_post(served.prefill, PATH, body):
            said = waiting.result()
    assert said.status == 200
    assert [(room["room"], room["phase"]) for room in said.json()["open"]] == [(body["bootstrap_room"], "EXPECTED")]


def test_it_says_503_and_what_is_open_when_none_has_come(served: Served) -> None:
    body = body_for(served)
    with begin_post(served.prefill, PATH, body):
        look(served.prefill, "/rooms?phase=EXPECTED&within_s=20")
        said = look(served.prefill, "/rooms?phase=SENDING&within_s=0.1")
    assert said.status == 503
    assert [room["phase"] for room in said.json()["open"]] == ["EXPECTED"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("phase=Transferring&within_s=1", "phase='Transferring': give one of NEW, "),
        ("phase=SENDING", "within_s='': give seconds in (0, 60]"),
        ("phase=SENDING&within_s=61", "within_s='61'"),
    ],
)
def test_a_query_that_cannot_be_meant_is_400(served: Served, query: str, words: str) -> None:
    said = look(served.prefill, f"/rooms?{query}")
    assert said.status == 400
    assert words in said.json()["error"]["message"]

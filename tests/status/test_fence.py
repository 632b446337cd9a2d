"""The route `/fence`: request bodies that are refused, and hosts at which no peer was lost."""

from __future__ import annotations

import contextlib
import http.client

import pytest

from .status_helpers import Answer, Pair


def post(address: str, body: str, content_type: str = "application/json") -> Answer:
    with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as connection:
        connection.request("POST", "/fence", body, {"Content-Type": content_type})
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type") or "", response.read().decode())


def test_a_host_of_which_no_peer_was_lost_gets_one_sentence(sink: str) -> None:
    answer = post(sink, '{"host": "10.9.9.9"}')
    assert (answer.status, answer.error) == (400, "no lost peer at 10.9.9.9; lost peers: none")


def test_what_is_linked_is_not_fenced(pair: Pair, sink: str) -> None:
    assert pair.hand_over(7) > 0
    for body in ('{"host": "127.0.0.1"}', f'{{"peer": "{pair.prefill.address}"}}'):
        answer = post(sink, body)
        assert answer.status == 400
        assert "is linked now, and a linked peer is never fenced: end its processes first" in answer.error
    assert pair.hand_over(8) > 0


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"host": 1}', '{"host": "a", "peer": "b:1"}', '{"hosts": "a"}', '{"host": "a b"}',
             '{"peer": "10.0.0.1"}', '{"host": "10.0.0.1:7000"}', "\xff"],
)  # fmt: skip
def test_a_body_that_names_no_place_is_refused(sink: str, body: str) -> None:
    answer = post(sink, body)
    assert answer.status == 400
    assert len(answer.error) < 300


def test_a_page_in_a_browser_cannot_say_it(sink: str) -> None:
    answer = post(sink, '{"host": "10.9.9.9"}', "text/plain")
    assert (answer.status, answer.error) == (400, "send the body as application/json")

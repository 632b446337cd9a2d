"""Signatures verify only for the holder of the secret, this request, about this time, and the response to it."""

from __future__ import annotations

import pytest

from kvroom.bootstrap.sign import REPLAY_WINDOW_S, Signed, check, check_time, is_proven, sign, sign_answer
from kvroom.errors import AuthenticationError
from kvroom.wire import auth

SECRET = b"sixteen bytes of secret"
TIME_S = 1_700_000_000
NOW_S = TIME_S + 0.5
SIGNED = Signed(TIME_S, bytes(range(32)))
GOOD = ("PUT", "/route?x=1", b"body")


def test_what_is_signed_is_accepted_within_the_window() -> None:
    signed = check(SECRET, sign(SECRET, *GOOD, SIGNED), *GOOD)
    assert signed == SIGNED
    for away_s in (0, REPLAY_WINDOW_S - 1, -REPLAY_WINDOW_S + 1):
        check_time(signed, NOW_S + away_s)


@pytest.mark.parametrize("away_s", [REPLAY_WINDOW_S + 1, -REPLAY_WINDOW_S - 1])
def test_outside_the_window_both_times_are_named(away_s: float) -> None:
    signed = check(SECRET, sign(SECRET, *GOOD, SIGNED), *GOOD)
    with pytest.raises(
        AuthenticationError, match=f"1700000000, but the directory's clock is at {NOW_S + away_s:.0f}: set the clocks"
    ):
        check_time(signed, NOW_S + away_s)


@pytest.mark.parametrize(
    "other",
    [("POST", "/route?x=1", b"body"), ("PUT", "/route?x=2", b"body"), ("PUT", "/route?x=1", b"bodY")],
)
def test_a_signature_is_good_for_its_own_request_only(other: tuple[str, str, bytes]) -> None:
    header = sign(SECRET, *GOOD, SIGNED)
    with pytest.raises(AuthenticationError, match="an invalid signature"):
        check(SECRET, header, *other)
    with pytest.raises(AuthenticationError, match="an invalid signature"):
        check(b"another secret entirely", header, *GOOD)
    for old, new in (("1700000000", "1700000001"), (":0001", ":1001"), ("1e1f:", "1e1e:")):
        with pytest.raises(AuthenticationError, match="an invalid signature"):
            check(SECRET, header.replace(old, new), *GOOD)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "KVRoom",
        "KVRoom x:y",
        "Bearer abc",
        "KVRoom 1:" + "a" * 64,
        "KVRoom 1:" + "a" * 64 + ":" + "g" * 64,
        "KVRoom 1:" + "a" * 62 + ":" + "a" * 64,
        "KVRoom 01:" + "a" * 64 + ":" + "a" * 64,
    ],
)
def test_a_missing_or_malformed_header_is_said_to_be_so(header: str) -> None:
    with pytest.raises(AuthenticationError, match="invalid Authorization header: expected KVRoom"):
        check(SECRET, header, *GOOD)
    with pytest.raises(AuthenticationError, match="not signed: give this worker the directory's secret, KVROOM_SECRET"):
        check(SECRET, None, *GOOD)


def test_an_answer_is_proven_for_its_own_request_status_and_body_only() -> None:
    nonce = SIGNED.nonce
    header = sign_answer(SECRET, nonce, 200, b"body")
    assert is_proven(SECRET, header, nonce, 200, b"body")
    assert not is_proven(b"another secret entirely", header, nonce, 200, b"body")
    assert not is_proven(SECRET, header, bytes(32), 200, b"body")
    assert not is_proven(SECRET, header, nonce, 503, b"body")
    assert not is_proven(SECRET, header, nonce, 200, b"bodY")
    assert not is_proven(SECRET, header, nonce, 20, b"0body")


@pytest.mark.parametrize("header", [None, "", "x" * 64, "0" * 62, "0" * 64, "\u0660" * 64])
def test_what_is_no_signature_proves_nothing(header: str | None) -> None:
    assert not is_proven(SECRET, header, SIGNED.nonce, 200, b"body")


def test_a_requests_signature_is_none_of_an_answer() -> None:
    """A server without the secret can send the request's signature back."""
    header = sign(SECRET, *GOOD, SIGNED)
    mac = header.rpartition(":")[2]
    for status, body in ((200, GOOD[2]), (200, b"")):
        assert not is_proven(SECRET, mac, SIGNED.nonce, status, body)


def test_the_label_tells_an_answer_from_a_request() -> None:
    """A signature over the same parts with the label of requests does not verify for a response."""
    parts = SIGNED.nonce, b"200", b"body"
    assert not is_proven(SECRET, auth.prove(SECRET, b"kvroom bootstrap request", parts).hex(), parts[0], 200, b"body")
    assert is_proven(SECRET, auth.prove(SECRET, b"kvroom bootstrap answer", parts).hex(), parts[0], 200, b"body")

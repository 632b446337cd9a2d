"""Signatures: only the holder of the secret, only this request, only about now."""

from __future__ import annotations

import pytest

from kvroom.bootstrap.sign import REPLAY_WINDOW_S, check, sign
from kvroom.errors import AuthenticationError

SECRET = b"sixteen bytes of secret"
NOW_S = 1_700_000_000.5
GOOD = ("PUT", "/route?x=1", b"body")


def test_what_is_signed_is_accepted_within_the_window() -> None:
    header = sign(SECRET, *GOOD, NOW_S)
    for away_s in (0, REPLAY_WINDOW_S - 1, -REPLAY_WINDOW_S + 1):
        check(SECRET, header, *GOOD, NOW_S + away_s)


@pytest.mark.parametrize("away_s", [REPLAY_WINDOW_S + 1, -REPLAY_WINDOW_S - 1])
def test_outside_the_window_both_times_are_named(away_s: float) -> None:
    header = sign(SECRET, *GOOD, NOW_S)
    with pytest.raises(AuthenticationError, match=f"1700000000, here it is {NOW_S + away_s:.0f}: set the clocks"):
        check(SECRET, header, *GOOD, NOW_S + away_s)


@pytest.mark.parametrize(
    "other",
    [("POST", "/route?x=1", b"body"), ("PUT", "/route?x=2", b"body"), ("PUT", "/route?x=1", b"bodY")],
)
def test_a_signature_is_good_for_its_own_request_only(other: tuple[str, str, bytes]) -> None:
    header = sign(SECRET, *GOOD, NOW_S)
    with pytest.raises(AuthenticationError, match="signature is wrong"):
        check(SECRET, header, *other, NOW_S)
    with pytest.raises(AuthenticationError, match="signature is wrong"):
        check(b"another secret entirely", header, *GOOD, NOW_S)
    with pytest.raises(AuthenticationError, match="signature is wrong"):
        check(SECRET, header.replace("1700000000", "1700000001"), *GOOD, NOW_S)


@pytest.mark.parametrize("header", ["", "KVRoom", "KVRoom x:y", "Bearer abc", "KVRoom 1:" + "g" * 64])
def test_a_missing_or_malformed_header_is_said_to_be_so(header: str) -> None:
    with pytest.raises(AuthenticationError, match="malformed"):
        check(SECRET, header, *GOOD, NOW_S)
    with pytest.raises(AuthenticationError, match="not signed: give this worker the directory's secret, KVROOM_SECRET"):
        check(SECRET, None, *GOOD, NOW_S)

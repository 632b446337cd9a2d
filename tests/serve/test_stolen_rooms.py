"""A room number and a bootstrap address give no access without the prompt: a wrong digest fails the room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import SECRET, SIZES, Served
from .helpers import Process, assert_idle, begin_post, finish, look, post, running
from .test_contract import PATH, body_for, error_of

VICTIM = "My password is swordfish-7741."


@pytest.fixture(scope="module")
def other(model_dir: Path) -> Iterator[Process]:
    """Yield a second decode worker with the secret of the first."""
    with running("decode", "--model", str(model_dir), *SIZES, KVROOM_SECRET=SECRET) as process:
        yield process


def prompt_of(served: Served, text: str) -> dict[str, Any]:
    return body_for(served, prompt=text)


def stolen(victim: dict[str, Any], text: str) -> dict[str, Any]:
    """Return an attacker's request for the victim's room: another prompt, all other fields as the victim sent them."""
    return {**victim, "prompt": text}


def check_refused(served: Served, decode_url: str, text: str) -> None:
    """Assert that an attacker with the room's number and this text gets an error from a decode worker."""
    victim = prompt_of(served, VICTIM)
    with begin_post(served.prefill, PATH, victim) as connection:
        assert look(served.prefill, "/rooms?phase=EXPECTED&within_s=10").status == 200
        reply = post(decode_url, PATH, stolen(victim, text))
        assert finish(connection).status == 503
    assert reply.status == 503
    assert set(reply.json()) == {"error"}
    assert "the two sides were given different requests: tokens is" in error_of(reply)


@pytest.mark.parametrize(
    "text", ["x" * len(VICTIM), VICTIM[:-1] + "!", "m" + VICTIM[1:]], ids=["unlike", "last-token", "first-token"]
)
def test_another_prompt_of_that_length_gets_nothing(served: Served, text: str) -> None:
    check_refused(served, served.decode, text)


@pytest.mark.parametrize("text", ["x" * len(VICTIM), VICTIM.swapcase()], ids=["unlike", "case"])
def test_another_decode_worker_gets_nothing_either(served: Served, other: Process, text: str) -> None:
    check_refused(served, other.url, text)
    assert_idle([other.url])


def test_the_whole_prompt_is_what_opens_the_room(served: Served, other: Process) -> None:
    """An attacker with the whole prompt gets the answer, and the victim's own decode leg fails."""
    victim = prompt_of(served, VICTIM)
    with begin_post(served.prefill, PATH, victim) as connection:
        assert look(served.prefill, "/rooms?phase=EXPECTED&within_s=10").status == 200
        taken = post(other.url, PATH, stolen(victim, VICTIM))
        assert finish(connection).status == 200
    assert taken.status == 200
    late = post(served.decode, PATH, victim)
    assert late.status == 503
    assert_idle([other.url])

"""A real pair with a model of full and sliding-window layers, which vLLM keeps in groups with a block table each."""

from __future__ import annotations

import pytest
from clients import both_at_once, complete, in_turn, run
from fixtures import new_room
from fleet import Pair
from models import WINDOW
from sets import Garage

SERVERS = "sliding"
pytestmark = pytest.mark.timeout(1500)


def test_windows_are_handed_over(garage: Garage) -> None:
    """Prompts shorter and longer than the window."""
    pair = Pair(**garage.take(SERVERS))
    loaded = 0
    for length in (20, 300, 1000):
        for way in ("in turn", "at once"):
            prompt = [1000 + (7919 * i + length + 13 * (way == "in turn")) % 40000 for i in range(length)]
            expected = run(complete(pair.prefill.url, prompt, salt="alone"))
            if way == "in turn":
                answer = run(in_turn(pair.prefill.url, pair.decode.url, prompt))
            else:
                _, answer = run(both_at_once(pair.prefill.url, pair.decode.url, prompt, new_room(pair.prefill)))
            assert (answer.detail, answer.tokens) == ("", expected.tokens)
            over = max(0, length - 1 - (WINDOW - 1)) % 128
            loaded += length - 1 - over
    assert pair.decode.metric("vllm:kvroom_tokens_loaded_total") == loaded
    for one in pair.servers:
        one.wait_for_usage()
    transport = pair.decode.extra["transport"]
    (how,) = pair.decode.rooms()["peers"].values()
    assert transport == "auto" or how.startswith(transport)

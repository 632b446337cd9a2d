"""The same hand-off over other transports, each between a pair of servers of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import assert_right, moved
from clients import in_turn, run
from fixtures import Truth
from fleet import kvroom_pair, running

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_a_pair_over_another_transport(model: Path, logs: Path, truth: Truth, transport: str) -> None:
    asked = [*truth.short[:3], *truth.long[:3]]
    with running(kvroom_pair(model, logs, name=f"{transport}-", transport=transport)) as pair:
        with moved(pair, asked):
            answers = [run(in_turn(pair.prefill.url, pair.decode.url, prompt)) for prompt in asked]
            assert_right(answers, asked, truth)
        for server in pair.servers:
            (how,) = server.rooms()["peers"].values()
            assert how.startswith(transport), how

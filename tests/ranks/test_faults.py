"""One rank of several dies, aborts or falls silent, at every moment: the others end, name the cause, and keep nothing.

Each run has every fault at every moment, and some of them over each transport.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvroom_lab.ranks.cases import BY_NAME
from kvroom_lab.ranks.faults import FAULT_CASES, Fault, Moment, Story, run_story, stories
from kvroom_lab.ranks.fleet import Processes

EVERY = {name: list(stories(BY_NAME[name])) for name in FAULT_CASES}
PLAIN = BY_NAME["tp2-tp4"]
STORIES = {
    # Together: every fault at every moment, on the first and on the last rank. `local` depends most on which rank dies.
    "tcp": [story for name in FAULT_CASES for story in EVERY[name] if story.last == (name != "tp2-tp4")],
    "local": [
        *(story for story in EVERY["tp2-tp4"] if story.last),
        *(story for story in EVERY["mla-tp4-tp1"] if story.fault.kills and not story.last),
    ],
    "nixl": [Story(PLAIN, fault, Moment.MIDDLE) for fault in Fault if fault is not Fault.SILENT_SOURCE],
    "mooncake": [Story(PLAIN, Fault.KILL_SOURCE, Moment.MIDDLE), Story(PLAIN, Fault.ABORT_SINK, Moment.FLYING)],
}
TOLD = [
    pytest.param(transport, story, id=f"{transport}-{story.name}")
    for transport in STORIES
    for story in STORIES[transport]
]


def kinds(case: dict[str, Any]) -> list[Any]:
    story: Story = case["story"]
    return [(story.moment, story.fault), case["transport"]]


@pytest.mark.sampled(kinds=kinds)
@pytest.mark.parametrize(("transport", "story"), TOLD)
def test_the_others_end_well(transport: str, story: Story, processes: Processes) -> None:
    assert run_story(story, transport, processes) == []

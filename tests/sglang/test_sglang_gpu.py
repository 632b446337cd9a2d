"""Pools on a GPU: pages move between them, and a cached prefix is sent only after SGLang's event is set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sglang_helpers import new_prompt
from sglangqueues import Pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def two() -> Iterator[Pair]:
    """Return two schedulers with pools on the GPU."""
    with Pair({"TRANSPORT": "local"}, device="cuda:0") as pair:
        yield pair


def test_pages_move_between_pools_on_the_gpu(two: Pair) -> None:
    for half in (two.prefill, two.decode):
        assert {region.device for region in half.manager.manager.layout.regions} == {"cuda:0"}
    two.hand_over(new_prompt(100), 32, 64)
    two.wait_idle()


def test_a_cached_prefix_waits_for_the_events_of_the_device(two: Pair) -> None:
    source, sink = two.requests(new_prompt(60))
    sender, one = two.prefill.begin(source), two.decode.begin(sink)
    two.decode.offer(one)
    two.prefill.ready(source)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # the device writes the pages a while after SGLang has sent the chunk
        two.prefill.compute(source, 0, 32)
        event = torch.cuda.Event()
        event.record(stream)
    sender._early_send_wait_event = event
    two.prefill.send(source, 32)
    two.prefill.compute(source, 32, 60)
    two.prefill.send(source)
    two.prefill.finish(source)
    two.decode.finish(one)
    assert two.decode.wrong_tokens(sink) == []

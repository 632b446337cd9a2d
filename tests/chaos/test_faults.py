"""A worker dies, falls silent or is cut off during transfers, under load, with the real model and router.

Every client gets the right tokens or a clear error within its deadline. After that nothing is left on any worker, and
each of them, including the restarted one, serves the next request. A quick run draws one death and one silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from .clients import LONG, Load, Outcome, Tally, ask_directly
from .conftest import Scene
from .fleet import Worker

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

DEADLINE_S = 150.0
LOST = "the link to"


class UnderLoad:
    """A long prompt in the middle of its transfer between two known workers, with eight other requests."""

    def __init__(self, load: Load, victim: Future[Outcome]) -> None:
        self.load = load
        self.victim = victim
        self.tally = Tally()


@contextmanager
def under_load(scene: Scene) -> Iterator[UnderLoad]:
    """Wait for every client when the block ends; then `tally` is filled."""
    prefill, decode = scene.fleet.prefills[0], scene.fleet.decodes[0]
    load = Load(scene.truth, scene.fleet.url, DEADLINE_S)
    here = UnderLoad(load, load.ask_directly(prefill, decode, scene.long[0]))
    decode.wait_for("RECEIVING")
    load.ask(scene.prompts)
    prefill.wait_for("SENDING")
    yield here
    here.tally = load.finish().check()
    print(here.tally)


def assert_serves(scene: Scene) -> None:
    """Check that the router answers, and that each pair of workers does."""
    scene.fleet.assert_whole()
    load = Load(scene.truth, scene.fleet.url, DEADLINE_S)
    for decode in scene.fleet.decodes:
        for prefill, prompt in zip(scene.fleet.prefills, scene.short[6:], strict=True):
            load.ask_directly(prefill, decode, prompt)
    load.ask(scene.short[:2])
    assert load.finish().check().causes == {}


def quarantined(worker: Worker) -> int:
    pool: dict[str, Any] = worker.rooms()["pool"]
    assert pool["free"] + pool["cached"] + pool["owned"] + pool["quarantined"] == pool["pages"]
    pages: int = pool["quarantined"]
    return pages


def a_killed_prefill(scene: Scene) -> None:
    prefill, decode = scene.fleet.prefills[0], scene.fleet.decodes[0]
    with under_load(scene) as here:
        prefill.kill()
        assert LOST in here.victim.result(DEADLINE_S).detail
    assert here.tally.verdicts["right"] > 0, "the other prefill worker has answered no client"
    decode.assert_whole()
    prefill.start()
    assert_serves(scene)


def a_killed_decode(scene: Scene) -> None:
    decode = scene.fleet.decodes[0]
    with under_load(scene):
        decode.kill()
    for prefill in scene.fleet.prefills:
        prefill.assert_whole()
    decode.start()
    assert_serves(scene)


def a_stopped_prefill(scene: Scene) -> None:
    (prefill, other), decode = scene.fleet.prefills, scene.fleet.decodes[0]
    with under_load(scene) as here:
        prefill.stop()
        assert LOST in here.victim.result(DEADLINE_S).detail
        one_sided = any(how.startswith("local") for how in decode.rooms()["peers"].values())
        if one_sided:  # its process lives and could still write: only its own statement is proof
            decode.wait_for("QUARANTINED")
            assert quarantined(decode) >= LONG // 16
        answer = ask_directly(other, decode, scene.short[6], deadline_s=DEADLINE_S)
        assert answer.verdict(scene.truth.answer(scene.short[6])) == "right", answer
        assert (quarantined(decode) > 0) == one_sided
        prefill.go_on()
    assert_serves(scene)


def a_cut_link(scene: Scene) -> None:
    prefill, decode = scene.fleet.prefills[0], scene.fleet.decodes[0]
    with under_load(scene) as here:
        scene.wire.cut()
        assert LOST in here.victim.result(DEADLINE_S).detail
        refused = ask_directly(prefill, decode, scene.short[6], deadline_s=DEADLINE_S)
        assert "decode side in phase OPENED" in refused.detail, refused
        scene.wire.mend()
    assert_serves(scene)


@pytest.mark.sampled("cast")
@pytest.mark.parametrize("fault", [a_killed_prefill, a_killed_decode], ids=lambda fault: fault.__name__)
def test_a_worker_dies(scene: Scene, fault: Callable[[Scene], None]) -> None:
    fault(scene)


@pytest.mark.sampled("cast")
@pytest.mark.parametrize("fault", [a_stopped_prefill, a_cut_link], ids=lambda fault: fault.__name__)
def test_a_worker_falls_silent(scene: Scene, fault: Callable[[Scene], None]) -> None:
    fault(scene)


@pytest.mark.chaos  # for the prefill side it is the same as a cut link
def test_a_stopped_decode(scene: Scene) -> None:
    prefill, decode = scene.fleet.prefills[0], scene.fleet.decodes[0]
    with under_load(scene) as here:
        decode.stop()
        prefill.wait_for("RELEASED")
        decode.go_on()
        assert LOST in here.victim.result(DEADLINE_S).detail
    assert_serves(scene)

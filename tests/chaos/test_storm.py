"""A storm: faults from a seed, one after the other, while clients keep asking; then calm, and everything is whole.

KVROOM_STORM_S seconds (default 60) of it, from KVROOM_STORM_SEED (default 1).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from .clients import Prompt, Tally, ask
from .conftest import Scene
from .fleet import Worker
from .test_faults import assert_serves

pytestmark = [pytest.mark.model, pytest.mark.chaos, pytest.mark.timeout(1800)]

STORM_S = float(os.environ.get("KVROOM_STORM_S", "60"))
SEED = int(os.environ.get("KVROOM_STORM_SEED", "1"))
DEADLINE_S = 240.0
CLIENTS = 8


class Storm:
    """Faults in an order that the seed decides. At most one worker is down or stopped at a time."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.log: list[str] = []
        self._scene = scene
        self._chance = random.Random(seed)
        self._began = time.monotonic()

    def strike(self) -> None:
        """One fault in the middle of some transfer, and its end."""
        fleet = self._scene.fleet
        worker = self._chance.choice(fleet.workers)
        error: Callable[[Worker], None] = self._chance.choice([self.kill, self.stop, self.cut, self.glance])
        worker.wait_for("SENDING" if worker in fleet.prefills else self._chance.choice(["OFFERED", "RECEIVING"]))
        struck_s = time.monotonic() - self._began
        error(worker)
        lasted_s = time.monotonic() - self._began - struck_s
        name = f"{worker.role} {fleet.workers.index(worker)}"
        self.log.append(f"{struck_s:.1f} s: {error.__name__} {name} for {lasted_s:.1f} s")

    def kill(self, worker: Worker) -> None:
        worker.kill()
        worker.start()

    def stop(self, worker: Worker) -> None:
        """Stopped until every other side has given it up."""
        worker.stop()
        self._wait_until_noticed(worker)
        worker.go_on()

    def glance(self, worker: Worker) -> None:
        """Stop the worker for the time of a few requests to the others. No client may notice that."""
        worker.stop()
        for other in self._scene.fleet.workers:
            if other is not worker:
                other.rooms()
        worker.go_on()

    def cut(self, worker: Worker) -> None:
        self._scene.wire.cut()
        self._wait_until_noticed(worker)
        self._scene.wire.mend()

    def _wait_until_noticed(self, worker: Worker) -> None:
        fleet = self._scene.fleet
        for other in fleet.decodes if worker in fleet.prefills else fleet.prefills:
            other.wait_until_unlinked(worker)


def test_a_storm(scene: Scene) -> None:
    storm = Storm(scene, SEED)
    tally, calm = Tally(), threading.Event()
    threads = [threading.Thread(target=keep_asking, args=(scene, tally, calm, number)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + STORM_S
    try:
        while time.monotonic() < end:
            storm.strike()
    finally:
        scene.wire.mend()
        scene.fleet.heal()
        calm.set()
        for thread in threads:
            thread.join()
    print(f"storm of seed {SEED}: \n  {'; '.join(storm.log)}\n{tally}")
    tally.check()
    assert tally.verdicts["right"] > 0
    assert_serves(scene)


def keep_asking(scene: Scene, tally: Tally, calm: threading.Event, number: int) -> None:
    """One client: asks, looks at the answer, asks again; a tenth of its prompts is long."""
    chance = random.Random(SEED * 1000 + number)
    while not calm.is_set():
        prompt: Prompt = chance.choice(scene.long if chance.random() < 0.1 else scene.short)
        outcome = ask(scene.fleet.url, prompt, stream=chance.random() < 0.5, deadline_s=DEADLINE_S)
        tally.add(outcome, scene.truth.answer(prompt), DEADLINE_S)

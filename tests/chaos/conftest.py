"""One fleet of real workers with the real model for all tests here; each finds it healthy and leaves it so.

The deadlines of the workers are short, so that silence is noticed within seconds. The clients' are long: what counts is
that each is answered, also while other tests keep the machine busy.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .clients import LONG, SHORT, Prompt, Truth
from .fleet import Fleet, Worker
from .wire import Wire

SIZES = ("--dtype", "float32", "--checksum", "--pages", "640", "--chunk-tokens", "64")
DEADLINES = (
    "--bootstrap-s", "8", "--waiting-s", "60", "--stall-s", "20", "--drain-s", "1",
    "--heartbeat-s", "2",
)  # fmt: skip


class Scene:
    """The objects that every test of this folder uses: the fleet, the wire between its workers, prompts and answers."""

    def __init__(self, fleet: Fleet, wire: Wire, truth: Truth) -> None:
        self.fleet = fleet
        self.wire = wire
        self.truth = truth
        self.long = [truth.shuffled(LONG, seed) for seed in range(3)]
        self.short = [truth.shuffled(SHORT, seed) for seed in range(100, 108)]

    @property
    def prompts(self) -> list[Prompt]:
        """Return the load of most tests, beside the long prompt that meets the fault: another long and seven short."""
        return self.long[1:2] + self.short[:7]


@pytest.fixture(scope="session")
def truth() -> Truth:
    return Truth()


@pytest.fixture(scope="session", params=["auto", pytest.param("tcp", marks=pytest.mark.chaos)])
def cast(request: pytest.FixtureRequest, truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    logs = tmp_path_factory.mktemp("workers")
    arguments = (*SIZES, *DEADLINES, "--transport", request.param)
    with Wire() as wire:
        prefills = [Worker("prefill", arguments, logs / f"p{n}", wire, f"127.0.0.{n + 2}") for n in range(2)]
        decodes = [Worker("decode", arguments, logs / "d0", wire, "127.0.0.4")]
        with Fleet(prefills, decodes) as fleet:
            yield Scene(fleet, wire, truth)


@pytest.fixture
def scene(cast: Scene) -> Iterator[Scene]:
    """Healthy when the test begins; healed and whole after it, so that one that failed does not spoil the next."""
    yield cast
    cast.wire.mend()
    cast.fleet.heal()
    cast.fleet.assert_whole()

"""Whole managers over virtual time: many seeds keep the laws, a seed repeats, planted bugs are found.

Every run plays the first seeds, among which each fault and each cause occurs, and some that it draws. A quick run
plants half of the bugs, drawn as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from planted import BUGS, Bug

import sampling
from kvroom.core.room import Room
from kvroom_lab.simulate import SimulationFailed, Summary, main, simulate
from kvroom_lab.simulation.run import run

pytestmark = pytest.mark.timeout(900)  # about 60 s of CPU, on a machine that may be busy
FIRST = sampling.amount(400, full=3_000)
DRAWN = 300
SEEDS = FIRST + DRAWN
REPEATED = (0, 3, 36, 48, 58)
WITHIN = 1_000
"""The number of seeds within which every planted bug must be found."""

FAULTS = (
    "message lost",
    "message repeated",
    "message comes late",
    "network slows down",
    "partition",
    "connection reset",
    "process crashes",
    "host dies",
    "restart",
    "process replaced while it lives",
    "process stops (slow consumer)",
    "manager is closed",
    "transfer breaks",
    "a wrong byte lands",
    "connecting the transport fails",
    "pool is full",
)
CAUSES = (
    "RoomInUse",
    "LimitExceeded",
    "aborted",
    "cleared before",
    "was silent",
    "reads too slowly",
    "restarted",
    "the manager was closed",
    "the link",
    "the connection to",
    "the transfer to",
    "cannot be a source",
    "cannot connect",
    "no answer",
    "early arrivals",
    "got no request",
    "checksum mismatch",
    "offered pages for",
    "waiting for a decode worker",
    "waiting for links",
    "waiting for the engine",
    "waiting for the first bytes",
    "waiting for more bytes",
    "waiting for its transfers",
    "waiting for its own checksum",
    "to compare the checksum",
    "to send the reason why it revoked its grant",
)


@pytest.fixture(scope="module")
def summary(pytestconfig: pytest.Config) -> Summary:
    draw = sampling.generator(pytestconfig, "simulation")
    return simulate([*range(FIRST), *draw.sample(range(3_000, 1_000_000), DRAWN)])


def test_hundreds_of_seeds_keep_the_laws(summary: Summary) -> None:
    print(f"{summary.seeds} seeds, {summary.events} events, {summary.cpu_s:.1f} s of CPU")
    assert summary.seeds == SEEDS
    assert summary.tally["bytes compared"] > 100 * SEEDS


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_happened(summary: Summary, fault: str) -> None:
    assert summary.tally[f"fault: {fault}"] > 0


@pytest.mark.parametrize("cause", CAUSES)
def test_rooms_have_failed_for_every_cause(summary: Summary, cause: str) -> None:
    assert summary.tally[f"failure: {cause}"] > 0


@pytest.mark.parametrize("side", ["source", "sink"])
def test_rooms_have_succeeded(summary: Summary, side: str) -> None:
    assert summary.tally[f"success: {side}"] > SEEDS


def test_sources_have_waited_for_sinks_that_renewed(summary: Summary) -> None:
    """These sinks offered later than a source waits without renewals."""
    assert summary.tally["success: a sink whose offer came late"] > SEEDS / 20


@pytest.mark.parametrize("seed", REPEATED)
def test_a_seed_repeats_exactly(seed: int) -> None:
    first, second = run(seed, tracing=True), run(seed, tracing=True)
    assert len(first.trace) > 50
    assert first.trace == second.trace
    assert (first.events, first.tally) == (second.events, second.tally)


def test_tracing_changes_nothing() -> None:
    for seed in REPEATED:
        seen, unseen = run(seed, tracing=True), run(seed)
        assert (seen.events, seen.tally) == (unseen.events, unseen.tally)
        assert unseen.trace == ()


def test_seeds_differ() -> None:
    assert len({run(seed, tracing=True).digest for seed in REPEATED}) == len(REPEATED)


def test_a_seed_repeats_in_another_process() -> None:
    """Hashes of strings and addresses of objects differ there; nothing may depend on them."""
    code = "\n".join(
        [
            "import sys",
            "from kvroom_lab.simulation.run import run",
            "print(*[run(int(seed), tracing=True).digest for seed in sys.argv[1:]])",
        ]
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *map(str, REPEATED)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    ]
    assert said[0] == said[1] == [run(seed, tracing=True).digest for seed in REPEATED]


@pytest.mark.sampled(least=9)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    for seed in range(WITHIN):
        broken = run(seed).broken
        if broken is not None:
            print(f"seed {seed}: {broken}")
            return
    pytest.fail(f"not found within {WITHIN} seeds")


def _plant(monkeypatch: pytest.MonkeyPatch) -> None:
    finish: Callable[..., None] = Room._enter_terminal

    def twice(self: Room, event: object) -> None:
        finish(self, event)
        self.outbox *= 2

    monkeypatch.setattr(Room, "_enter_terminal", twice)


def test_a_failure_tells_its_seed_its_trace_and_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch)
    with pytest.raises(SimulationFailed, match=r"law 6: .* was given its pages back twice") as failed:
        simulate(range(100))
    lines = str(failed.value).splitlines()
    seed = failed.value.seed
    assert lines[0].startswith(f"seed {seed}: law 6: ")
    assert any(line.endswith(" opens") for line in lines)
    assert lines[-1] == f"repeat it: python -m kvroom_lab.simulate --trace {seed}"


def test_the_command_counts_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--first", "7"]) == 0
    said = capsys.readouterr().out
    assert "success: sink" in said
    assert "3 seeds, " in said.splitlines()[-1]


def test_the_command_prints_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", "7"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "seed 7: every law was kept"
    assert len(said) > 50


def test_the_command_fails_with_a_broken_law(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant(monkeypatch)
    assert main(["--seeds", "20"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "--trace" in said[-1]
    assert main(["--trace", said[-1].split()[-1]]) == 1


def test_the_architecture_page_has_the_number_of_planted_bugs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text()
    assert f"{len(BUGS)} in the driver, the links and the handles" in " ".join(page.split())

"""The servers' log lines from a failed test, added to its report: they alone contain the cause of a refused load."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path

import pytest
from fleet import LOGS

LAST_LINES = 30
_NOISE = ("INFO:  ", "Route: ", "/metrics HTTP", "/health HTTP")
_BEFORE = pytest.StashKey[Mapping[Path, int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record the size of each log before the test."""
    item.stash[_BEFORE] = {log: log.stat().st_size for log in LOGS}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a section to a failed test for each server that has written to its log since."""
    report = yield
    if report.failed:
        report.sections += [
            (f"log of {name}", said)
            for log, name in LOGS.items()
            if (said := written(log, item.stash.get(_BEFORE, {}).get(log, 0)))
        ]
    return report


def written(log: Path, since: int) -> str:
    """Return the last lines after this byte, without those that only record an HTTP request."""
    with log.open("rb") as file:
        file.seek(since)
        lines = file.read().decode(errors="replace").splitlines()
    told = [line for line in lines if line and not any(noise in line for noise in _NOISE)]
    return "\n".join(told[-LAST_LINES:])

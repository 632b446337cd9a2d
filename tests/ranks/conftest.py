"""Processes for the ranks, kept from one test to the next: starting one takes longer than most tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvroom.transports import probe
from kvroom_lab.ranks.fleet import Processes

ENGINES = ("nixl", "mooncake")  # libraries of different vendors are not loaded into one process


@pytest.fixture(scope="package")
def kept() -> Iterator[dict[str, Processes]]:
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(Processes()) for kind in ("plain", *ENGINES)}


@pytest.fixture
def processes(transport: str, kept: dict[str, Processes]) -> Processes:
    if missing := probe(transport).missing:
        pytest.skip(f"{transport}: {missing[0]}")
    return kept[transport if transport in ENGINES else "plain"]

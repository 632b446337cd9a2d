"""The choice of `auto` between transports, from findings alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvroom.transports import REGISTRY
from kvroom.transports.kit.probing import Missing, ProbeResult
from kvroom.transports.selection.choice import TransportReport, report_on, verdicts

HERE = TransportReport("local", "yes", True, True, "machine", "kvroom", "", ("cpu",), False, (), ())
ENGINE = TransportReport("engine", "yes", True, False, "network", "engine 1.0", "", ("cpu", "cuda"), False, (), ())
SOCKETS = TransportReport("tcp", "yes", True, True, "network", "kvroom", "", ("cpu",), False, (), ())
NEVER = TransportReport("fake", "yes", False, False, "network", "kvroom", "", ("cpu", "cuda"), True, (), ())
BOTH = ("cpu", "cuda")
ABSENT = (Missing("the Python package engine", "package", "pip install engine"), Missing("RDMA", "device", "buy one"))


def taken(kinds: set[str], *rows: TransportReport) -> list[str]:
    return [verdict.transport for verdict in verdicts(rows, kinds) if verdict.taken]


def but(row: TransportReport, **changes: Any) -> TransportReport:
    return msgspec.structs.replace(row, **changes)


@pytest.mark.parametrize(
    ("kinds", "rows", "expected"),
    [
        ({"cpu"}, (HERE, ENGINE, SOCKETS), ["local", "tcp"]),
        ({"cpu"}, (HERE, but(ENGINE, fast=True), SOCKETS), ["local", "engine", "tcp"]),
        ({"cuda"}, (HERE, ENGINE, SOCKETS), ["engine"]),
        ({"cpu", "cuda"}, (HERE, ENGINE, SOCKETS), ["engine"]),
        # `local` moves such memory, but to no other machine: without the engine, no transport would.
        ({"cuda"}, (but(HERE, devices=BOTH), ENGINE, SOCKETS), ["local", "engine"]),
        ({"cuda"}, (but(HERE, devices=BOTH), ENGINE, but(SOCKETS, devices=BOTH)), ["local", "tcp"]),
        ({"cpu"}, (HERE, but(ENGINE, fast=True, runs="no", missing=ABSENT), SOCKETS), ["local", "tcp"]),
        ({"cpu"}, (HERE, but(ENGINE, fast=True, runs="double", missing=ABSENT), SOCKETS), ["local", "tcp"]),
        ({"cpu"}, (HERE, ENGINE, but(SOCKETS, runs="no", missing=ABSENT)), ["local", "engine"]),
        ({"npu"}, (HERE, but(ENGINE, fast=True), SOCKETS), []),
        ({"cpu"}, (NEVER,), []),
    ],
)  # fmt: skip
def test_what_is_taken(kinds: set[str], rows: tuple[TransportReport, ...], expected: list[str]) -> None:
    assert taken(kinds, *rows) == expected


def test_each_verdict_says_why() -> None:
    rows = (
        HERE,
        but(ENGINE, runs="no", missing=ABSENT),
        but(ENGINE, transport="rails", fast=True),
        ENGINE,
        SOCKETS,
        NEVER,
    )
    assert [(verdict.transport, verdict.reason) for verdict in verdicts(rows, {"cpu"})] == [
        ("local", "it needs no package and no hardware"),
        ("engine", "it cannot run: missing the Python package engine and 1 more"),
        ("rails", "this machine has hardware that it drives best"),
        ("engine", "no RDMA or NVLink here, so it would be slower than local and tcp"),
        ("tcp", "it needs no package and no hardware"),
    ]
    assert [verdict.reason for verdict in verdicts((HERE, ENGINE), {"cuda"})] == [
        "it does not move cuda memory",
        "no basic transport moves cuda memory to other machines",
    ]


def test_a_row_from_elsewhere_that_names_nothing_missing_is_read_all_the_same() -> None:
    (verdict,) = verdicts((but(ENGINE, runs="no"),), {"cpu"})
    assert (verdict.taken, verdict.reason) == (False, "it cannot run: missing something that it does not name")


@pytest.mark.parametrize(
    ("finding", "double", "runs"),
    [
        (ProbeResult("tcp 1"), "", "yes"),
        (ProbeResult("tcp 1"), "doubles.tcp", "yes"),
        (ProbeResult("tcp", ABSENT), "", "no"),
        (ProbeResult("tcp", ABSENT), "doubles.tcp", "double"),
    ],
)
def test_a_row_is_the_finding_and_the_line_of_the_registry(
    finding: ProbeResult, double: str, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvroom.transports.tcp.probe", lambda: finding)
    row = report_on("tcp", double)
    assert (row.transport, row.runs, row.part, row.missing, row.double) == (
        "tcp", runs, finding.part, finding.missing, double,
    )  # fmt: skip
    assert (row.auto, row.basic, row.reach) == REGISTRY["tcp"][1:]

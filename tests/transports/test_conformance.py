"""Every transport passes the conformance suite, with each end in a process of its own wherever the transport can.

A quick run makes every check over `tcp` and over one of the two modes of `local`. It draws some of the checks over
`memory`, which is for tests, some of those over engines of other projects, and some of the planted bugs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import FOUND, PLANTED, Bug

from kvroom.conformance import failures, moves, refusals, stage
from kvroom.conformance.ends import Bytes, Host, Hosts
from kvroom.conformance.stage import CheckStage, Skipped, scattered
from kvroom.conformance.suite import CHECKS, Case, Check, judge, main, run
from kvroom.transports import probe

OURS = {
    "memory": Case("memory", one_process=True),
    "tcp": Case("tcp", {"introduction_s": 0.1}),
    "local-vm": Case("local", {"mode": "vm"}),
    "local-shm": Case("local", {"mode": "shm", "threads": 1}, shared=True),
}
OTHERS = {
    "nixl": Case("nixl", reopens=8),
    "mooncake": Case("mooncake", {"trusted_fabric": True}, reopens=2),  # each of its engines takes a second to end
    "ascend-double": Case(
        "ascend",
        {"part": "kvroom_lab.doubles.memfabric_hybrid", "data_op_type": "HOST_RDMA", "trusted_fabric": True},
        reopens=8,
    ),
    "mori-double": Case("mori", {"part": "kvroom_lab.doubles.mori_io", "trusted_fabric": True}, reopens=8),
}
AUTO_CHECKS = (
    moves.moves_scattered_unaligned_blocks,
    refusals.refuses_unregistered_destination,
    refusals.fences_and_connects_again,
    failures.a_killed_peer_fails_transfers_and_is_fenced,
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def planted_hosts() -> Iterator[Hosts]:
    """Processes that can import the module `faulty`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        hosts = Hosts()
        hosts.want(2)
        yield hosts
        hosts.close()


def ours(given: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the cases that every quick run must contain: each check over the transports that move bytes for users."""
    name = OURS[given["case"]].name
    return [] if name == "memory" else [(given["check"].__name__, name)]


@pytest.mark.sampled("case", kinds=ours)
@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_transport(check: Check, case: str, hosts: Hosts) -> None:
    run_or_skip(check, OURS[case], hosts)


@pytest.mark.sampled("case", least=len(CHECKS) // 2)
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_transport_with_an_engine_of_others(check: Check, case: str, hosts: Hosts) -> None:
    missing = () if case.endswith("-double") else probe(OTHERS[case].name).missing
    if missing:
        pytest.skip(f"{case} cannot run here: {missing[0].what}")
    run_or_skip(check, OTHERS[case], hosts)


def run_or_skip(check: Check, case: Case, hosts: Hosts) -> None:
    try:
        run(check, case, hosts)
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("check", AUTO_CHECKS, ids=lambda check: check.__name__)
def test_auto(check: Check, hosts: Hosts) -> None:
    run(check, Case("auto"), hosts)


def test_all_transports_leave_the_same_bytes(hosts: Hosts) -> None:
    left: list[list[Bytes]] = []

    def transfer(stage: CheckStage) -> None:
        pair = stage.pair()
        blocks = scattered(pair.source, pair.sink, 3_000, 2_500)
        pair.source.move(pair.to_sink, blocks, pair.grant())
        left.append(pair.sink.contents())

    for case in OURS.values():
        run(transfer, case, hosts)
    assert len(left) == len(OURS)
    for contents in left[1:]:
        for pool, wanted in zip(contents, left[0], strict=True):
            assert np.array_equal(pool, wanted)


@pytest.mark.sampled(least=len(FOUND) // 3)
@pytest.mark.parametrize(
    ("bug", "check"), FOUND, ids=lambda value: value.transport.__name__ if isinstance(value, Bug) else value.__name__
)
def test_the_suite_finds_a_planted_bug(
    bug: Bug, check: Check, planted_hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (moves, failures):
        monkeypatch.setattr(module, "SOON_S", 0.5)
    monkeypatch.setattr(stage, "PATIENCE_S", 3.0)
    verdict, reason = judge(check, bug.case, planted_hosts)
    assert (verdict, bug.word in reason) == ("FAILED", True), reason


def test_every_check_finds_something() -> None:
    assert {name for bug in PLANTED for name in bug.checks} == {check.__name__ for check in CHECKS}


def test_every_check_says_what_it_asks() -> None:
    assert all(check.__doc__ for check in CHECKS)


def test_the_command_tells_who_failed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["faulty:Overshoots", "--one-process", "--only", "moves_one_byte", "--only", "moves_no_blocks"]
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("FAILED")
    assert "moves_one_byte: AssertionError: pool 2: 1 bytes are wrong" in lines[0]
    assert lines[1].startswith("ok")
    assert lines[2].startswith("faulty:Overshoots: 2 checks, 1 failed")


def test_the_command_passes_options_on(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["local", "--option", "mode=shm", "--option", "threads=1", "--shared", "--only", "moves_one_byte"]
    assert main(arguments) == 0
    assert main(["local", "--option", "mode=fast", "--only", "moves_one_byte"]) == 1
    assert "ConfigurationError: transport local: mode='fast'" in capsys.readouterr().out


def test_the_command_lists_what_the_checks_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CHECKS)


def test_a_process_that_ends_is_a_failure_and_is_not_used_again() -> None:
    def crash(stage: CheckStage) -> None:
        end = stage.open()
        stage.kill(end)
        end.describe()

    hosts = Hosts()
    verdict, reason = judge(crash, Case("local"), hosts)
    assert verdict == "FAILED"
    assert "ended when asked 'describe'" in reason
    host = hosts.take()
    assert isinstance(host, Host)
    assert host.alive
    host.close()

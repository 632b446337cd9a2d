"""Engines of several ranks, each a real process: requests are handed over, and every byte of every pool is checked."""

from __future__ import annotations

import pytest

from kvroom_lab.ranks.cases import BY_NAME, FEW
from kvroom_lab.ranks.fleet import Processes, run, run_one_by_one

SUMMED = ("3-heads-tp2-tp4", "cp2-cp1-zigzag", "mla-tp2cp2-tp1", "hybrid-tp2-tp1")


@pytest.mark.sampled("transport", least=len(BY_NAME) // 2)
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("transport", ["tcp", "local", "nixl"])
def test_a_hand_over(name: str, transport: str, processes: Processes) -> None:
    assert run(BY_NAME[name], transport, processes) == []


@pytest.mark.sampled(least=2)
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("transport", ["mooncake"])
def test_a_hand_over_by_a_slow_engine(name: str, transport: str, processes: Processes) -> None:
    assert run(BY_NAME[name], transport, processes) == []


@pytest.mark.sampled("name", "checksum", "transport")
@pytest.mark.parametrize("name", ["tp1-tp2", "pp2tp2-pp2tp1", "mla-tp2-tp4", "hybrid-tp1-tp2"])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("transport", ["tcp", "local"])
def test_decode_ranks_that_come_late(name: str, checksum: bool, transport: str, processes: Processes) -> None:
    assert run_one_by_one(BY_NAME[name], transport, processes, checksum=checksum) == []


@pytest.mark.sampled(least=2)
@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("transport", ["tcp"])
def test_checksums_of_several_sources_agree(name: str, transport: str, processes: Processes) -> None:
    assert run(BY_NAME[name], transport, processes, checksum=True) == []


@pytest.mark.parametrize("transport", ["local"])
def test_shared_pools(transport: str, processes: Processes) -> None:
    assert run(BY_NAME["tp2-tp4"], transport, processes, options={"mode": "shm"}, shared=True) == []


@pytest.mark.parametrize("transport", ["fake"])
def test_bytes_that_do_not_come_are_missed_on_every_sink(transport: str, processes: Processes) -> None:
    wrong = run(BY_NAME["tp2-tp4"], transport, processes)
    for tp in range(4):
        assert any(fault.startswith(f"sink dp 0, cp 0, tp {tp}, pp 0: ") for fault in wrong)
    assert not any(fault.startswith("source") for fault in wrong)

"""Real ranks over torch: the least state of each room, with its cause, or an error that names why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agreement_helpers import Answer, Ranks, States, ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvroom.core.phases import KVPoll
from kvroom.errors import LimitExceeded
from kvroom.runtime.agreement import AgreementError, RankConsensus
from kvroom.runtime.agreement.rooms import FIRST_VALUES, MAX_BODY_BYTES, MAX_CAUSE_CHARS, MAX_ROOMS

OK = {7: (KVPoll.Success, None)}
TIMEOUT_S = 4.0

pytest.importorskip("torch")


@pytest.fixture(scope="module", params=[1, 2, 4])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(request.param, tmp_path_factory.mktemp("torch") / "meeting") as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ranks(2, tmp_path_factory.mktemp("torch") / "meeting") as found:
        yield found


@pytest.mark.sampled(together="engine", least=2)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_rank_learns_the_least_state_and_the_cause_of_who_has_it(engine: Ranks, data: st.DataObject) -> None:
    rooms = data.draw(st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=6))
    said = [
        {
            room: (status, data.draw(st.none() | st.text(max_size=8)) if status is KVPoll.Failed else None)
            for room in data.draw(st.permutations(rooms))
            for status in [data.draw(st.sampled_from(KVPoll))]
        }
        for _ in range(engine.size)
    ]
    for one, found in zip(said, engine.agree(*said), strict=True):
        assert isinstance(found, dict)
        assert list(found) == list(one)
        for room, agreed in found.items():
            states = [other[room] for other in said]
            rank = min(range(engine.size), key=lambda rank: (states[rank][0], rank))
            detail = states[rank][1] or "it stated no reason"
            assert agreed == (states[rank][0], rank, detail if states[rank][0] is KVPoll.Failed else None)


@pytest.mark.sampled(together="engine", least=2)
def test_more_rooms_than_one_exchange_holds(engine: Ranks) -> None:
    count = 4 * FIRST_VALUES + 3
    said: list[States] = [
        {room: (KVPoll.Failed, f"{room}!") if room % engine.size == rank else OK[7] for room in range(count)}
        for rank in range(engine.size)
    ]
    for found in engine.agree(*said):
        assert found == {room: RankConsensus(KVPoll.Failed, room % engine.size, f"{room}!") for room in range(count)}


@pytest.mark.sampled(together="engine", least=2)
def test_different_rooms_are_named_on_every_rank_and_the_next_call_works(engine: Ranks) -> None:
    if engine.size == 1:
        assert engine.agree(OK) == [{7: RankConsensus(KVPoll.Success, 0)}]
        return
    said: list[States] = [*[OK] * (engine.size - 1), dict.fromkeys((7, 8, 9), OK[7])]
    for found in engine.agree(*said):
        assert isinstance(found, AgreementError)
        last = engine.size - 1
        assert f"different rooms: in addition to the 1 that all have, rank {last} has 8, 9; call agree with" in str(
            found
        )
    swapped: list[States] = [dict.fromkeys((7, 8), OK[7]), *[dict.fromkeys((7, 9), OK[7])] * (engine.size - 1)]
    for found in engine.agree(*swapped):
        assert isinstance(found, AgreementError)
        assert "in addition to the 1 that all have, rank 0 has 8; rank 1 has 9" in str(found)
    many: list[States] = [dict.fromkeys(range(1000), OK[7]), *[OK] * (engine.size - 1)]
    for found in engine.agree(*many):
        assert isinstance(found, AgreementError)
        assert "rank 0 has 0, 1, 2, 3, 4 and 994 more" in str(found)
    assert engine.agree(*[OK] * engine.size) == [{7: RankConsensus(KVPoll.Success, 0)}] * engine.size


def test_a_sentence_for_every_rank() -> None:
    assert (
        RankConsensus(KVPoll.Failed, 2, "the pool is full").sentence(7) == "room 7 failed on rank 2: the pool is full"
    )
    assert RankConsensus(KVPoll.Transferring, 1).sentence(7) == "room 7 is Transferring on rank 1"


def faults(engine: Ranks, among: range | list[int]) -> list[str]:
    answers: list[Answer] = [engine.answer(rank) for rank in among]
    assert all(isinstance(answer, AgreementError) for answer in answers), answers
    return [str(answer) for answer in answers]


@pytest.mark.sampled
@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_dies_is_named_by_all_others(dead: int, tmp_path: Path) -> None:
    alive = [rank for rank in range(3) if rank != dead]
    with ranks(3, tmp_path / "meeting", TIMEOUT_S) as engine:
        assert engine.agree(OK, OK, OK) == [{7: RankConsensus(KVPoll.Success, 0)}] * 3
        for rank in alive:
            engine.tell(rank, OK)
        engine.kill(dead)
        for error in faults(engine, alive):
            assert f"rank {dead} " in error
            assert not any(f"rank {rank} " in error for rank in alive), error
        for rank in alive:
            engine.tell(rank, OK)
        assert all(f"rank {dead} " in error for error in faults(engine, alive))


@pytest.mark.sampled
@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_that_is_silent_is_named_by_all_others(silent: int, tmp_path: Path) -> None:
    others = [rank for rank in range(3) if rank != silent]
    with ranks(3, tmp_path / "meeting", TIMEOUT_S) as engine:
        for rank in reversed(others):  # rank 0 last, so that the others time out before it does
            engine.tell(rank, OK)
        for error in faults(engine, others):
            assert f"rank {silent} did not answer for" in error
        engine.tell(silent, OK)
        assert faults(engine, [silent]), "it comes late and agrees with itself"


def test_too_many_rooms_are_refused_on_all_ranks_alike(pair: Ranks) -> None:
    states = dict.fromkeys(range(MAX_ROOMS + 1), OK[7])
    for found in pair.agree(states, states):
        assert isinstance(found, LimitExceeded)
        assert f"{MAX_ROOMS + 1} rooms to agree on, and the limit is {MAX_ROOMS}" in str(found)
    del states[5]
    assert pair.agree(states, states) == [{room: RankConsensus(KVPoll.Success, 0) for room in states}] * 2


def test_causes_are_cut_so_that_any_number_of_them_fits(pair: Ranks) -> None:
    long = {7: (KVPoll.Failed, "x" * 5000)}
    assert pair.agree(long, OK) == [{7: RankConsensus(KVPoll.Failed, 0, "x" * MAX_CAUSE_CHARS)}] * 2
    every = dict.fromkeys(range(MAX_ROOMS), (KVPoll.Failed, "\N{SNOWMAN}" * 5000))
    one, other = pair.agree(every, every)
    assert one == other
    assert isinstance(one, dict)
    assert {agreed.detail for agreed in one.values()} == {"\N{SNOWMAN}" * 4}


def test_a_body_over_the_limit_is_refused_on_all_ranks_alike(pair: Ranks) -> None:
    for found in pair.call("gather", b"x", bytes(3 << 20)):
        assert isinstance(found, AgreementError)
        assert str(found) == f"a rank sends {3 << 20} bytes, and the limit is {MAX_BODY_BYTES}: agree on fewer rooms"
    assert pair.call("gather", b"x", b"") == [[b"x", b""]] * 2


def test_a_rank_that_closed_takes_no_more_calls_and_is_named(tmp_path: Path) -> None:
    with ranks(2, tmp_path / "meeting", TIMEOUT_S) as engine:
        assert engine.call("least", [2, 1], [1, 5]) == [[1, 1]] * 2
        assert engine.call_one(1, "close", None) is None
        assert engine.call_one(1, "close", None) is None
        found, closed = engine.call("least", [1], [1])
        assert isinstance(found, AgreementError)
        assert "rank 1 " in str(found)
        assert isinstance(closed, AgreementError)
        assert str(closed) == "this carrier is closed"

"""Real ranks, over sockets and over torch: the least state of each room, with its cause, or an error that names why."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agreekit import SECRET, Answer, Ranks, States, ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvroom.core.phases import KVPoll
from kvroom.dialling.dial import Dial
from kvroom.errors import ConfigurationError, LimitExceeded
from kvroom.runtime.agreement import Agreement, AgreementError, RankConsensus, SocketCarrier
from kvroom.runtime.agreement.lines import MAX_STRANGERS, Frame, Least, RankSocket, Stop
from kvroom.runtime.agreement.rooms import FIRST_VALUES, MAX_CAUSE_CHARS, MAX_ROOMS
from kvroom.wire.frames import FrameReader, encode_frame

KINDS = ["sockets"] + (["torch"] if importlib.util.find_spec("torch") else [])
OK = {7: (KVPoll.Success, None)}
TIMEOUT_S = 4.0
LOST = [("sockets", 0), ("sockets", 2), *[("torch", 0)] * ("torch" in KINDS)]
SILENT = [("sockets", 0), ("sockets", 2), *[("torch", 2)] * ("torch" in KINDS)]


@pytest.fixture(scope="module", params=[(kind, size) for kind in KINDS for size in (1, 2, 4)], ids=str)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    kind, size = request.param
    with ranks(kind, size, tmp_path_factory.mktemp("torch") / "meeting") as found:
        yield found


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
            cause = states[rank][1] or "it gave no cause"
            assert agreed == (states[rank][0], rank, cause if states[rank][0] is KVPoll.Failed else None)


def test_more_rooms_than_one_exchange_holds(engine: Ranks) -> None:
    count = 4 * FIRST_VALUES + 3
    said: list[States] = [
        {room: (KVPoll.Failed, f"{room}!") if room % engine.size == rank else OK[7] for room in range(count)}
        for rank in range(engine.size)
    ]
    for found in engine.agree(*said):
        assert found == {room: RankConsensus(KVPoll.Failed, room % engine.size, f"{room}!") for room in range(count)}


def test_different_rooms_are_named_on_every_rank_and_the_next_call_works(engine: Ranks) -> None:
    if engine.size == 1:
        assert engine.agree(OK) == [{7: RankConsensus(KVPoll.Success, 0)}]
        return
    said: list[States] = [*[OK] * (engine.size - 1), dict.fromkeys((7, 8, 9), OK[7])]
    for found in engine.agree(*said):
        assert isinstance(found, AgreementError)
        last = engine.size - 1
        assert f"different rooms: besides the 1 that all have, rank {last} has 8, 9; call agree with" in str(found)
    swapped: list[States] = [dict.fromkeys((7, 8), OK[7]), *[dict.fromkeys((7, 9), OK[7])] * (engine.size - 1)]
    for found in engine.agree(*swapped):
        assert isinstance(found, AgreementError)
        assert "besides the 1 that all have, rank 0 has 8; rank 1 has 9" in str(found)
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


@pytest.mark.parametrize(("kind", "dead"), LOST)
def test_a_rank_that_dies_is_named_by_all_others(kind: str, dead: int, tmp_path: Path) -> None:
    alive = [rank for rank in range(3) if rank != dead]
    with ranks(kind, 3, tmp_path / "meeting", TIMEOUT_S) as engine:
        assert engine.agree(OK, OK, OK) == [{7: RankConsensus(KVPoll.Success, 0)}] * 3
        for rank in alive:
            engine.tell(rank, OK)
        engine.kill(dead)
        for fault in faults(engine, alive):
            assert f"rank {dead} " in fault
            assert not any(f"rank {rank} " in fault for rank in alive), fault
        for rank in alive:
            engine.tell(rank, OK)
        assert all(f"rank {dead} " in fault for fault in faults(engine, alive))


@pytest.mark.parametrize(("kind", "silent"), SILENT)
def test_a_rank_that_is_silent_is_named_by_all_others(kind: str, silent: int, tmp_path: Path) -> None:
    others = [rank for rank in range(3) if rank != silent]
    with ranks(kind, 3, tmp_path / "meeting", TIMEOUT_S) as engine:
        for rank in reversed(others):  # rank 0 last: the others wait for it longer than it waits for them
            engine.tell(rank, OK)
        for fault in faults(engine, others):
            assert f"rank {silent} did not answer for" in fault
            if (kind, silent) == ("sockets", 0):
                assert f"for {2 * TIMEOUT_S:g} s" in fault  # rank 0 itself waits half of that, and then says who it is
        engine.tell(silent, OK)
        assert faults(engine, [silent]), "it comes late and agrees with itself"


# -- sockets alone: threads are enough


class Threads:
    """Two ranks in this process; `both` runs one call on each at once."""

    def __init__(self, *, timeout_s: float = 30) -> None:
        self._pool = ThreadPoolExecutor(2)
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        root = self._pool.submit(SocketCarrier, 0, 2, listener, timeout_s=timeout_s)
        member = self._pool.submit(SocketCarrier, 1, 2, address, timeout_s=timeout_s)
        self.carriers = [root.result(), member.result()]

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for carrier in self.carriers:
            carrier.close()
        self._pool.shutdown()

    def both(self, first: tuple[Callable[[Any], object], object], second: tuple[Any, object]) -> list[object]:
        """What each of two calls returns or raises; a call is (method, argument)."""
        calls = [self._pool.submit(method, argument) for method, argument in (first, second)]
        wait(calls)
        return [call.exception() or call.result() for call in calls]


def test_too_many_rooms_are_refused_on_all_ranks_alike() -> None:
    states = dict.fromkeys(range(MAX_ROOMS + 1), OK[7])
    with Threads() as pair:
        first, second = map(Agreement, pair.carriers)
        for found in pair.both((first.agree, states), (second.agree, states)):
            assert isinstance(found, LimitExceeded)
            assert f"{MAX_ROOMS + 1} rooms to agree on, allowed are {MAX_ROOMS}" in str(found)
        del states[5]
        assert (
            pair.both((first.agree, states), (second.agree, states))
            == [{room: RankConsensus(KVPoll.Success, 0) for room in states}] * 2
        )


def test_causes_are_cut_so_that_any_number_of_them_fits() -> None:
    with Threads() as pair:
        first, second = map(Agreement, pair.carriers)
        long = {7: (KVPoll.Failed, "x" * 5000)}
        found = pair.both((first.agree, long), (second.agree, OK))
        assert found == [{7: RankConsensus(KVPoll.Failed, 0, "x" * MAX_CAUSE_CHARS)}] * 2
        every = dict.fromkeys(range(MAX_ROOMS), (KVPoll.Failed, "\N{SNOWMAN}" * 5000))
        one, other = pair.both((first.agree, every), (second.agree, every))
        assert one == other
        assert isinstance(one, dict)
        assert {agreed.cause for agreed in one.values()} == {"\N{SNOWMAN}" * 4}


def test_ranks_that_are_not_in_lockstep_are_told_so() -> None:
    with Threads() as pair:
        first, second = pair.carriers
        one, other = pair.both((first.least, [1]), (second.gather, b""))
        assert "rank 1 is at another point (gather 1) than rank 0 (least 1)" in str(one)
        assert str(other) == str(one)
    with Threads() as pair:
        first, second = pair.carriers
        one, other = pair.both((first.least, [1, 2]), (second.least, [1]))
        assert "rank 0 found 2, 1 values, not 2" in str(one)
        assert str(other) == str(one)


def test_a_rank_that_closes_says_so_and_takes_no_more_calls() -> None:
    with Threads() as pair:
        first, second = pair.carriers
        second.close()
        second.close()
        for carrier in (first, second):
            with pytest.raises(AgreementError, match="rank 1 of this engine was closed"):
                carrier.least([1])
        first.close()
        with pytest.raises(AgreementError, match="rank 1 of this engine was closed"):
            first.least([1])


def test_the_last_answer_holds_when_rank_0_closes_right_behind_it() -> None:
    with Threads() as pair:
        first, second = pair.carriers

        def last(values: list[int]) -> list[int]:
            least = first.least(values)
            first.close()
            return least

        for _ in range(20):
            assert pair.both((first.least, [2]), (second.least, [1])) == [[1], [1]]
        assert pair.both((last, [2]), (second.least, [1])) == [[1], [1]]
        with pytest.raises(AgreementError, match="rank 0 of this engine was closed"):
            second.least([1])


def said_at_once(*frames: Frame) -> RankSocket:
    """A line on which these frames have come, and then its end."""
    ours, theirs = socket.socketpair()
    with theirs:
        for frame in frames:
            theirs.sendall(encode_frame(msgspec.msgpack.encode(frame)))
    return RankSocket(ours, FrameReader())


def test_who_goes_after_its_part_is_not_agreed_with_and_who_goes_after_the_whole_is() -> None:
    with Threads() as pair:
        for rank, carrier in enumerate(pair.carriers):
            for line in carrier._lines.values():
                line.socket.close()
            carrier._lines = {1 - rank: said_at_once(Least(1, [5]), Stop("it waited too long"))}
        first, second = pair.carriers
        with pytest.raises(AgreementError, match="it waited too long"):
            first.least([7])
        second._lines[0].send = lambda frame, until_s: None  # type: ignore[method-assign]  # nobody reads it
        assert second.least([7]) == [5]
        with pytest.raises(AgreementError, match="it waited too long"):
            second.least([7])


def test_a_body_over_the_limit_is_refused() -> None:
    with Threads() as pair:
        first, second = pair.carriers
        one, other = pair.both((first.gather, b"x"), (second.gather, bytes(3 << 20)))
        assert "rank 1 found 1 bodies over 2097152 bytes" in str(one)
        assert str(other) == str(one)


def join(address: str | socket.socket, rank: int, size: int = 3, *, secret: bytes = SECRET, join_s: float = 1) -> None:
    SocketCarrier(rank, size, address, secret=secret, join_s=join_s).close()


@contextlib.contextmanager
def root(size: int = 3, join_s: float = 60) -> Iterator[str]:
    """Rank 0 waits at the address in a thread of its own, which ends before this does."""
    listener = socket.create_server(("127.0.0.1", 0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(SocketCarrier, 0, size, listener, secret=SECRET, join_s=join_s)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        waiting.result().close()


def test_who_may_not_join_is_told_why_and_holds_up_nobody() -> None:
    with root(2) as address:
        host, port = address.split(":")
        strangers = [socket.create_connection((host, int(port)), timeout=30) for _ in range(MAX_STRANGERS + 3)]
        while strangers[0].recv(4096):  # until it is sent away, for there are too many
            pass
        with pytest.raises(AgreementError, match=rf"rank 1 cannot join rank 0 at {address}: the shared secrets of"):
            join(address, 1, 2, secret=b"another secret, long enough", join_s=30)
        with pytest.raises(AgreementError, match="rank 2 says that there are 3 ranks, rank 0 says 2: start all alike"):
            join(address, 2, 3, join_s=30)
        with contextlib.closing(SocketCarrier(1, 2, address, secret=SECRET)):
            for stranger in strangers:
                stranger.close()


def test_a_rank_that_is_there_twice_is_refused() -> None:
    with root(3) as address, ThreadPoolExecutor(2) as pool:
        twins = [pool.submit(join, address, 1, join_s=30) for _ in range(2)]
        (refused,) = wait(twins, return_when=FIRST_EXCEPTION).done
        with pytest.raises(AgreementError, match="rank 1 of 3 is here already: give each rank a number of its own"):
            refused.result()
        join(address, 2, join_s=30)


def test_who_does_not_come_is_named_on_every_rank() -> None:
    with pytest.raises(AgreementError, match=r"ranks 1, 2 did not come within 0\.2 s; is it up"), root(join_s=0.2):
        pass
    says = r"rank 2 did not come within 1 s; is it up"
    with (
        pytest.raises(AgreementError, match=says),
        root(join_s=1) as address,
        pytest.raises(AgreementError, match=says),
    ):
        join(address, 1, join_s=30)
    with pytest.raises(AgreementError, match=rf"rank 1 cannot join rank 0 at {address}: connection refused; is it up"):
        join(address, 1, join_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(AgreementError, match=r"no answer within 0\.2 s; does another program listen there"):
            join(address, 1, join_s=0.2)


def test_a_rank_0_that_comes_last_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    connect = Dial.connect

    def watched(call: Dial) -> socket.socket:
        try:
            return connect(call)
        except ConnectionRefusedError:
            refused.set()
            raise

    monkeypatch.setattr(Dial, "connect", watched)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(join, f"127.0.0.1:{port}", 1, 2, join_s=30)
        assert refused.wait(30)
        with contextlib.closing(SocketCarrier(0, 2, f"127.0.0.1:{port}", secret=SECRET)):
            waiting.result()


@pytest.mark.parametrize(
    ("rank", "size", "address", "says"),
    [
        (2, 2, "127.0.0.1:1", "rank 2 of 2: give a rank in"),
        (0, 257, "127.0.0.1:1", "at most 256 ranks"),
        (0, 2, "0.0.0.0:0", "not loopback and needs a shared secret"),
        (0, 2, "nonsense", "write host:port"),
        (1, 2, "nonsense", "write host:port"),
    ],
)
def test_what_cannot_be_is_refused_at_once(rank: int, size: int, address: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        SocketCarrier(rank, size, address)

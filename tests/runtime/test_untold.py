"""A room fails on the decode side before its links are up: the prefill side reports the same sentence immediately.

No deadline of the prefill side can end these rooms in time: its `bootstrap_s` is a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, RoomFailed, RoomInUse, Timeouts
from kvroom.bootstrap import client
from kvroom.core.causes import Cause
from kvroom.core.settings import Limits
from kvroom.errors import LimitExceeded
from kvroom.plan import Parallel, Place
from kvroom.runtime.handles import Handle
from kvroom.runtime.resolver import rank_info
from kvroom_lab.pools import TestPool

PATIENT = Timeouts(bootstrap_s=60, waiting_s=60, stall_s=60, drain_s=5, decline_s=1)
HASTY = Timeouts(bootstrap_s=1, waiting_s=60, stall_s=60, drain_s=5)
WAIT_S = 20.0


class Engines:
    """A directory, and managers of either side, with the given ranks."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.address = stack.enter_context(KVBootstrapServer()).address

    def prefill(self, parallel: Parallel, ranks: Sequence[int] | None = None) -> list[KVManager]:
        """Open managers of these tensor (or, with `dp`, data-parallel) ranks of an engine, all by default."""
        return [
            self.manager(parallel, rank, PATIENT, self.address)
            for rank in (range(parallel.dp * parallel.tp) if ranks is None else ranks)
        ]

    def decode(self, parallel: Parallel | None = None, rank: int = 0, *, limits: Limits | None = None) -> KVManager:
        return self.manager(parallel or Parallel(), rank, HASTY, None, limits)

    def manager(
        self, parallel: Parallel, rank: int, times: Timeouts, directory: str | None, limits: Limits | None = None
    ) -> KVManager:
        pool = TestPool()
        self._stack.callback(pool.close)
        return self._stack.enter_context(
            KVManager(
                pool.layout,
                transport="memory",
                register_with=directory,
                parallel=parallel,
                place=Place(rank, 0, 0, 0) if parallel.dp > 1 else Place(0, 0, rank, 0),
                timeouts=times,
                limits=limits,
            )
        )


@pytest.fixture
def engines() -> Iterator[Engines]:
    with contextlib.ExitStack() as stack:
        yield Engines(stack)


def end_of(handle: Handle) -> str:
    with pytest.raises(RoomFailed) as failed:
        handle.wait(WAIT_S)
    return str(failed.value)


def fail(prefill: Sequence[KVManager], decode: Sequence[KVManager], address: str, says: str) -> None:
    """Open one room on all of these ranks: it fails on each, with the sentence of one decode rank."""
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(manager.sender(7, identity=PROMPT)) for manager in prefill]
        receivers = [stack.enter_context(manager.receiver(address, 7, identity=PROMPT)) for manager in decode]
        for sender in senders:
            sender.send([1], stop=4)
        said = [end_of(receiver) for receiver in receivers]
        assert all(says in sentence for sentence in said), said
        heard = [end_of(sender) for sender in senders]
    assert set(heard) <= set(said)
    for manager in (*decode, *prefill):
        deadline_s = time.monotonic() + WAIT_S
        while (
            manager.audit() != Audit()
        ):  # the message of a second decode rank may come after the room is gone: it is kept a while
            assert time.monotonic() < deadline_s
            manager.wait_idle(WAIT_S)
    assert all(
        manager.counters().failed_by_cause.keys() <= {Cause.INCOMPATIBLE, Cause.UNREACHABLE} for manager in prefill
    )


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_decode_side_that_does_not_say_how_many_heads_names_the_setting_to_every_rank(
    engines: Engines, ranks: int
) -> None:
    prefill = engines.prefill(Parallel(tp=ranks, kv_heads=10))
    says = "start the managers of the sink with Parallel(kv_heads=10)"
    fail(prefill, [engines.decode()], engines.address, says)
    fail(prefill, [engines.decode()], engines.address, says)  # as often as it is tried


@pytest.mark.parametrize(("sources", "sinks"), [(4, 2), (2, 4), (3, 2)])
def test_the_ranks_of_a_decode_engine_share_the_telling(engines: Engines, sources: int, sinks: int) -> None:
    prefill = engines.prefill(Parallel(tp=sources, kv_heads=12))
    decode = [engines.decode(Parallel(tp=sinks, kv_heads=24), rank) for rank in range(sinks)]
    fail(prefill, decode, engines.address, "the source has 12 KV heads, the sink 24")
    deadline_s = time.monotonic() + WAIT_S
    while sum(links := [len(manager.peers()) for manager in decode]) < max(sources, sinks):
        assert time.monotonic() < deadline_s
    assert sum(links) == max(sources, sinks)  # and no prefill rank is informed by all decode ranks
    assert max(links) <= -(-sources // sinks)


def test_ranks_that_have_registered_hear_that_another_one_is_missing(engines: Engines) -> None:
    prefill = engines.prefill(Parallel(tp=3, kv_heads=3), ranks=[0, 2])
    fail(prefill, [engines.decode(Parallel(kv_heads=3))], engines.address, "lists 2 of 3 prefill ranks")


@pytest.mark.parametrize("silent", [True, False])
def test_ranks_that_can_be_linked_hear_that_another_one_cannot(engines: Engines, silent: bool) -> None:
    prefill = engines.prefill(Parallel(tp=2, kv_heads=2), ranks=[0])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        other = rank_info(
            prefill[0].me._replace(address=address, incarnation=1),
            prefill[0].layout,
            prefill[0].parallel,
            Place(0, 0, 1, 0),
        )
        asyncio.run(client.register(engines.address, other))
        if not silent:
            listener.close()
        fail(prefill, [engines.decode(Parallel(kv_heads=2))], engines.address, engines.address if silent else address)


def test_every_group_that_may_have_the_request_hears_that_nobody_knows_which_has_it(engines: Engines) -> None:
    prefill = [engines.manager(Parallel(dp=2), rank, PATIENT, None) for rank in range(2)]
    for rank, manager in enumerate(prefill):
        info = rank_info(manager.me, manager.layout, manager.parallel, Place(rank, 0, 0, 0))
        info = msgspec.structs.replace(info, load_balance_method="round_robin")
        asyncio.run(client.register(engines.address, info))
    fail(prefill, [engines.decode()], engines.address, "data-parallel rank of room 7: timed out after")


def test_only_the_group_that_has_the_request_hears_of_its_failure(engines: Engines) -> None:
    prefill = engines.prefill(Parallel(dp=2, tp=1, kv_heads=2))
    decode = engines.decode(Parallel(tp=2, kv_heads=4))
    with prefill[0].sender(7, identity=PROMPT) as other:
        fail(prefill[1:], [decode], engines.address, "the source has 2 KV heads, the sink 4")
        assert other.poll().name == "Bootstrapping"
    assert list(decode.peers()) == [prefill[1].address]


def test_a_decode_side_whose_table_is_full_tells_the_prefill_side(engines: Engines) -> None:
    (prefill,) = engines.prefill(Parallel())
    decode = engines.decode(limits=Limits(rooms=1))
    with prefill.sender(7, identity=PROMPT) as sender, decode.receiver(engines.address, 6, identity=PROMPT) as first:
        with decode.receiver(engines.address, 7, identity=PROMPT) as receiver:
            with pytest.raises(LimitExceeded, match="1 rooms are open, and the limit is 1"):
                receiver.wait(WAIT_S)
            assert "1 rooms are open, and the limit is 1 (Limits.rooms)" in end_of(sender)
        first.abort()


def test_a_room_number_that_is_open_already_leaves_the_first_room_alone(engines: Engines) -> None:
    (prefill,) = engines.prefill(Parallel())
    decode = engines.decode()
    with (
        prefill.sender(7, identity=PROMPT) as sender,
        decode.receiver(engines.address, 7, identity=PROMPT) as receiver,
        decode.receiver(engines.address, 7, identity=PROMPT) as second,
    ):
        with pytest.raises(RoomInUse):
            second.wait(WAIT_S)
        receiver.send_metadata([1], tokens=4)
        sender.send([2], stop=4, last=True)
        receiver.wait(WAIT_S)
        sender.wait(WAIT_S)


def test_an_engine_that_gave_up_before_the_search_failed_is_the_cause_that_is_told(engines: Engines) -> None:
    (prefill,) = engines.prefill(Parallel(tp=2, kv_heads=2), ranks=[0])
    decode = engines.decode(Parallel(kv_heads=2))
    with prefill.sender(7, identity=PROMPT) as sender:
        with decode.receiver(engines.address, 7, identity=PROMPT) as receiver:
            receiver.abort("the client left")
        assert "the client left" in end_of(sender)


def test_a_prefill_request_that_comes_a_moment_later_is_told_as_well(engines: Engines) -> None:
    prefill = engines.prefill(Parallel(tp=2, kv_heads=2))
    with engines.decode().receiver(engines.address, 7, identity=PROMPT) as receiver:
        said = end_of(receiver)
    for manager in prefill:
        with manager.sender(7, identity=PROMPT) as sender:
            assert end_of(sender) == said


def test_closing_does_not_wait_for_ranks_that_are_still_to_be_told(engines: Engines) -> None:
    prefill = engines.prefill(Parallel(tp=2, kv_heads=2), ranks=[0])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        me = prefill[0].me._replace(address=address, incarnation=1)
        info = rank_info(me, prefill[0].layout, prefill[0].parallel, Place(0, 0, 1, 0))
        asyncio.run(client.register(engines.address, info))
        decode = engines.decode()
        with decode.receiver(engines.address, 7, identity=PROMPT) as receiver:
            end_of(receiver)
        decode.close()


@pytest.mark.parametrize("theirs", [b"", b"another secret, as long as that"], ids=["none", "another"])
def test_a_decode_side_that_the_directory_refuses_is_in_the_log_of_the_prefill_side(
    theirs: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The decode side cannot find the prefill ranks, and has no valid secret: the directory logs the refusal."""
    ours = b"the secret of the prefill side"
    pool = TestPool()
    with contextlib.ExitStack() as stack:
        stack.callback(pool.close)
        directory = stack.enter_context(KVBootstrapServer(secret=ours))
        manager = stack.enter_context(KVManager(pool.layout, transport="tcp", secret=theirs))
        receiver = stack.enter_context(manager.receiver(directory.address, 7, identity=PROMPT))
        with pytest.raises(RoomFailed, match=r"refused GET /route \(401\): .*give this worker the directory's secret"):
            receiver.wait(20)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "kvroom.bootstrap.http"]
    assert line.startswith("refused GET /route from 127.0.0.1: the ")
    assert line.endswith("if this is a decode worker, its rooms will time out here")
    assert "KVRoom " not in caplog.text

"""A prefill side waits for a decode engine that has no pages yet, as long as the decode side renews, and no longer.

The source's deadline is far shorter than the time the decode engine takes; only the renewals keep its room.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
from manager_helpers import TIMES, Pair

from identities import PROMPT
from kvroom import Audit, KVBootstrapServer, KVManager, KVPoll, RoomFailed
from kvroom.core.causes import Cause
from kvroom_lab.pools import TestPool

LEASE_S = 0.5
LEASE = msgspec.structs.replace(TIMES, bootstrap_s=LEASE_S)
RENEWING = msgspec.structs.replace(TIMES, offer_s=0.02, renew_s=0.1)
WITHIN_S = 20.0
"""A limit for things that take a moment, on a busy machine."""


def until(holds: Callable[[], bool]) -> None:
    """Poll the manager; each question waits for its turn in the manager's loop."""
    end = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < end, f"not so within {WITHIN_S:g} s"


def phase_and_age_s(manager: KVManager, room: int) -> tuple[str, float]:
    """Return phase and age of the only room with this number."""
    (view,) = manager.room(room)
    return view.phase, view.timeline[-1][1]


def test_a_source_waits_for_a_sink_that_renews_until_it_offers() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack, timeouts=LEASE, decode_timeouts=RENEWING)
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            sender.send([5], stop=4, last=True, aux=b"first token")
            until(lambda: phase_and_age_s(pair.prefill, 7)[1] > 3 * LEASE_S)
            assert phase_and_age_s(pair.prefill, 7)[0] == "EXPECTED"
            assert receiver.poll() is KVPoll.WaitingForInput
            renewals = pair.prefill.counters().renewals
            assert 3 < renewals <= 3 + phase_and_age_s(pair.prefill, 7)[1] / RENEWING.renew_s
            receiver.send_metadata([9], tokens=4)
            assert receiver.wait(WITHIN_S).aux == b"first token"
            sender.wait(WITHIN_S)
        np.testing.assert_array_equal(pair.sink_pool.tokens([9], 4), pair.source_pool.tokens([5], 4))
        pair.check_clean()
        assert pair.prefill.counters().late_messages == 0


def test_an_engine_that_offers_at_once_renews_nothing() -> None:
    with contextlib.ExitStack() as stack:
        unhurried = msgspec.structs.replace(TIMES, offer_s=5)
        pair = Pair("memory", stack, decode_timeouts=unhurried)
        for room in range(20):
            with (
                pair.sender(room) as sender,
                pair.receiver(room) as receiver,
            ):
                receiver.send_metadata([9], tokens=4)
                sender.send([5], stop=4, last=True)
                receiver.wait(WITHIN_S)
                sender.wait(WITHIN_S)
        pair.check_clean()
        assert pair.prefill.counters().renewals == 0


def test_renewing_does_not_keep_the_sinks_own_room_beyond_its_deadline() -> None:
    with contextlib.ExitStack() as stack:
        brief = msgspec.structs.replace(RENEWING, waiting_s=1.0)
        pair = Pair("memory", stack, timeouts=LEASE, decode_timeouts=brief)
        with (
            pair.sender(7) as sender,
            pair.receiver(7) as receiver,
        ):
            sender.send([5], stop=4, last=True)
            with pytest.raises(
                RoomFailed,
                match=r"decode side .* timed out after 1 s \(waiting_s\) .* the engine to offer pages",
            ) as own:
                receiver.wait(WITHIN_S)
            with pytest.raises(RoomFailed) as told:
                sender.wait(WITHIN_S)
            assert str(told.value) == str(own.value)
        assert pair.prefill.counters().renewals > 1
        pair.check_clean()


def test_a_sink_that_waits_for_pages_hears_that_its_source_has_failed() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack, decode_timeouts=RENEWING)
        with pair.sender(7) as sender:
            sender.abort("the prompt is too long")
            pair.until(lambda: sender.poll() is KVPoll.Failed)
            with pair.receiver(7) as receiver:
                with pytest.raises(RoomFailed, match=r"prefill side in phase EXPECTED .* the prompt is too long"):
                    receiver.wait(WITHIN_S)
                assert receiver.released
        pair.check_clean()


def test_a_closed_decode_side_ends_the_wait_at_once() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack, decode_timeouts=RENEWING)
        with pair.sender(7) as sender:
            pair.receiver(7)
            until(lambda: pair.prefill.counters().renewals > 1)
            pair.decode.close()
            with pytest.raises(RoomFailed, match="the manager was closed"):
                sender.wait(TIMES.bootstrap_s / 2)
        assert pair.prefill.wait_idle(WITHIN_S)


def renew_until_killed(control: Connection, addr: str) -> None:
    """A decode worker that never has pages."""
    pool = TestPool(page_tokens=4, pages=32)
    with KVManager(pool.layout, transport="tcp", timeouts=RENEWING) as manager:
        control.send("ready")
        with manager.receiver(addr, control.recv(), identity=PROMPT):
            control.recv()


@contextlib.contextmanager
def decode_worker(addr: str) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=renew_until_killed, args=(theirs, addr), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        yield process, ours
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def test_a_killed_decode_side_keeps_the_room_no_longer_than_the_lease() -> None:
    pool = TestPool()
    lease = msgspec.structs.replace(TIMES, bootstrap_s=1.0)
    with KVBootstrapServer() as directory, contextlib.ExitStack() as stack:
        stack.callback(pool.close)
        manager = stack.enter_context(
            KVManager(pool.layout, transport="tcp", timeouts=lease, register_with=directory.address)
        )
        process, control = stack.enter_context(decode_worker(directory.address))
        with manager.sender(7, identity=PROMPT) as sender:
            sender.send([5], stop=4, last=True)
            control.send(7)
            until(lambda: phase_and_age_s(manager, 7)[1] > 1.5 * lease.bootstrap_s)
            assert phase_and_age_s(manager, 7)[0] == "EXPECTED"
            process.kill()
            with pytest.raises(
                RoomFailed, match=r"timed out after 1 s \(bootstrap_s\) .* a decode worker to offer pages"
            ):
                sender.wait(lease.bootstrap_s + WITHIN_S)
            assert sender.released
        assert manager.counters().failed_by_cause == {Cause.BOOTSTRAP: 1}
        assert manager.wait_idle(WITHIN_S)
        assert manager.audit() == Audit()

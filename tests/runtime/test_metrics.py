"""The observable state of two managers that hand rooms over: numbers, one room, and the log."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator

import msgspec
import pytest
from manager_helpers import TIMES, Pair

from identities import PROMPT
from kvroom import KVManager, RoomFailed, RoomInUse
from kvroom.core.causes import Cause
from kvroom.core.counts import Ending
from kvroom.core.messages import Done, Message
from kvroom.core.phases import Phase, Side
from kvroom.core.source import Source
from kvroom.core.trace import RequestTrace
from kvroom.runtime import logs
from kvroom.runtime.measure import LATENCY_BOUNDS_S, HandOffs, LinkView
from kvroom.transports.memory import MemoryTransport
from kvroom_lab.pools import TestPool


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        made = Pair("memory", stack)
        yield made
        made.check_clean()


def hand_over(pair: Pair, room: int, tokens: int = 4) -> int:
    """Hand over one room from beginning to end; return the bytes that it moved."""
    with (
        pair.sender(room) as sender,
        pair.receiver(room) as receiver,
    ):
        receiver.send_metadata([1], tokens=tokens)
        sender.send([1], stop=tokens, last=True)
        sender.wait(20)
        return receiver.wait(20).nbytes


def test_hand_offs_are_measured_on_both_sides(pair: Pair) -> None:
    before = time.monotonic()
    moved = [hand_over(pair, room, tokens) for room, tokens in ((1, 4), (2, 3), (3, 1))]
    assert moved[0] > moved[1] > moved[2] > 0
    for manager, side in ((pair.prefill, Side.SOURCE), (pair.decode, Side.SINK)):
        metrics = manager.metrics()
        sums = metrics.hand_offs[side.value]
        assert sum(sums.counts) == 3
        assert sums.nbytes == sum(moved)
        assert 0 < sums.total_s < time.monotonic() - before
        assert metrics.counters.ended == {Ending(side, None): 3}
        assert metrics.hand_offs["decode" if side is Side.SOURCE else "prefill"] == HandOffs()
    same = [manager.metrics().hand_offs[side.value].total_s for manager, side in
            ((pair.prefill, Side.SOURCE), (pair.decode, Side.SINK))]  # fmt: skip
    assert same[0] == same[1]  # both report the source's clock


def test_a_latency_lands_in_the_bucket_that_holds_it() -> None:
    sums = HandOffs()
    for latency_s in (0.0, LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[0] * 1.01, LATENCY_BOUNDS_S[-1] * 1.01):
        sums.note(latency_s, 10)
    assert sums.counts == [2, 1, *[0] * (len(LATENCY_BOUNDS_S) - 2), 1]
    assert sums.nbytes == 40


def test_a_peer_cannot_spoil_the_sums_with_a_time_that_is_none() -> None:
    for took_s in (float("inf"), float("nan"), -1.0):
        raw = msgspec.msgpack.encode(
            Done(room=7, generation=70, tokens=4, nbytes=64, identity=PROMPT, aux=b"", took_s=took_s)
        )
        with pytest.raises(msgspec.ValidationError, match="took_s"):
            msgspec.msgpack.decode(raw, type=Message)


def test_a_snapshot_does_not_change(pair: Pair) -> None:
    hand_over(pair, 1)
    metrics = pair.decode.metrics()
    counters = pair.decode.counters()
    hand_over(pair, 2)
    assert sum(metrics.hand_offs["decode"].counts) == 1
    assert metrics.counters.ended == counters.ended == {Ending(Side.SINK, None): 1}


def test_an_abort_is_counted_as_such_on_both_sides(pair: Pair) -> None:
    with (
        pair.sender(5) as sender,
        pair.receiver(5) as receiver,
    ):
        receiver.send_metadata([1], tokens=4)
        pair.until(lambda: sender.decode_prefix_len == 0)
        receiver.abort("the client went away")
        for handle in (sender, receiver):
            with pytest.raises(RoomFailed, match="the client went away"):
                handle.wait(20)
        assert pair.prefill.metrics().counters.failed_by_cause == {Cause.ABORTED: 1}
        assert pair.decode.metrics().counters.failed_by_cause == {Cause.ABORTED: 1}


def test_the_links_of_a_manager_are_seen() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        hand_over(pair, 1)
        (link,) = pair.decode.metrics().links
        assert link == LinkView(pair.prefill.address, "memory", up=True)
        assert pair.decode.metrics().links_lost == 0
        with pair.receiver(2) as receiver:
            receiver.send_metadata([1], tokens=4)
            pair.prefill.close()
            with pytest.raises(RoomFailed, match="the link to"):
                receiver.wait(20)
        assert pair.decode.wait_idle(10)
        assert pair.decode.metrics().links == ()
        assert pair.decode.metrics().links_lost == 1
        pair.prefill = stack.enter_context(
            KVManager(pair.source_pool.layout, transport="memory", register_with=pair.addr)
        )
        hand_over(pair, 3)
        assert [one.up for one in pair.decode.metrics().links] == [True]
        pair.check_clean()


def test_the_census_and_one_room_tell_what_it_waits_for(pair: Pair) -> None:
    transport = pair.transports[0]
    assert isinstance(transport, MemoryTransport)
    transport.faults.hold()
    with (
        pair.sender(9) as sender,
        pair.receiver(9) as receiver,
    ):
        receiver.send_metadata([1], tokens=4)
        sender.send([1], stop=4, last=True)
        pair.until(lambda: sender.poll().name == "Transferring")
        assert pair.prefill.metrics().census.rooms[Side.SOURCE][Phase.SENDING] == 1
        (view,) = pair.prefill.room(9)
        assert view.phase == "SENDING"
        assert view.waits_for == f"its transfers to {pair.decode.address} to end"
        assert view.waits_until_s is not None
        assert 0 < view.waits_until_s <= TIMES.stall_s
        phases, agos = zip(*view.timeline, strict=True)
        assert phases[0] == "EXPECTED"
        assert phases[-1] == "SENDING"
        assert list(agos) == sorted(agos, reverse=True)
        assert pair.prefill.room(10) == []
        transport.faults.release()
        sender.wait(20)
        receiver.wait(20)
    assert pair.prefill.wait_idle(10)
    assert pair.prefill.room(9) == []
    assert pair.prefill.metrics().census.kept == 0


def test_both_sides_of_a_number_are_told_if_one_manager_has_both() -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair("memory", stack)
        with pair.sender(3), pair.prefill.receiver(pair.addr, 3, identity=PROMPT):
            assert sorted(view.side for view in pair.prefill.room(3)) == ["decode", "prefill"]
        assert pair.prefill.wait_idle(10)


def test_all_rooms_are_told_whatever_their_number_and_the_oldest_first(pair: Pair) -> None:
    senders = [pair.sender(room) for room in range(600)]
    assert [view.room for view in pair.prefill.rooms()] == list(range(600))
    assert [view.room for view in pair.prefill.rooms(oldest=3)] == [0, 1, 2]
    assert pair.prefill.metrics().census.kept == 600
    for sender in senders:
        sender.clear()
    assert pair.prefill.rooms() == []


# -- the log


def about(caplog: pytest.LogCaptureFixture, room: int, level: int) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "room", None) == room and record.levelno == level]


def test_a_failure_is_logged_once_on_each_side_with_its_room(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    with caplog.at_level(logging.INFO, "kvroom"):
        with (
            pair.sender(4) as sender,
            pair.receiver(4) as receiver,
        ):
            receiver.send_metadata([1], tokens=4)
            sender.send([1, 2], stop=5, last=True)
            for handle in (sender, receiver):
                with pytest.raises(RoomFailed) as failed:
                    handle.wait(20)
        assert pair.prefill.wait_idle(10)
        assert pair.decode.wait_idle(10)
    records = about(caplog, 4, logging.WARNING)
    assert sorted(record.side for record in records) == ["decode", "prefill"]  # type: ignore[attr-defined]
    assert {record.getMessage() for record in records} == {str(failed.value)}
    assert {record.cause for record in records} == {"length_mismatch"}  # type: ignore[attr-defined]
    assert about(caplog, 4, logging.INFO) == []


def test_an_end_that_somebody_wanted_is_logged_as_information(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    with caplog.at_level(logging.INFO, "kvroom"), pair.sender(6) as sender:
        sender.abort("the client went away")
        with pytest.raises(RoomFailed):
            sender.wait(20)
    (record,) = about(caplog, 6, logging.INFO)
    assert "the client went away" in record.getMessage()


def test_a_number_in_use_is_logged_with_the_number(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    with pair.sender(8), pair.sender(8) as second:
        with pytest.raises(RoomInUse):
            second.wait(20)
        (record,) = about(caplog, 8, logging.WARNING)
        assert record.cause == "room_in_use"  # type: ignore[attr-defined]


def test_phases_are_logged_where_somebody_wants_to_know(caplog: pytest.LogCaptureFixture, pair: Pair) -> None:
    with caplog.at_level(logging.DEBUG, "kvroom.runtime.handles"):
        hand_over(pair, 2)
    said = [record.getMessage() for record in about(caplog, 2, logging.DEBUG)]
    assert said.count("room 2 is open") == 2
    assert said.count("room 2 is SENT") == 1
    assert said.count("room 2 is LANDED") == 1
    assert {record.generation for record in about(caplog, 2, logging.DEBUG) if record.phase == "SENT"} != {None}  # type: ignore[attr-defined]


def test_nothing_is_computed_for_a_level_that_is_off(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    def never(room: object) -> dict[str, object]:
        raise AssertionError(f"fields were computed for {room}")

    monkeypatch.setattr(logs, "_fields", never)
    logging.getLogger("kvroom").setLevel(logging.ERROR)
    try:
        hand_over(pair, 2)
        with pair.sender(6) as sender:
            sender.abort("enough")
            with pytest.raises(RoomFailed, match="enough"):
                sender.wait(20)
    finally:
        logging.getLogger("kvroom").setLevel(logging.NOTSET)


def record_about_a_room(**extra: object) -> logging.LogRecord:
    logger = logging.getLogger("kvroom.test")
    return logger.makeRecord(logger.name, logging.WARNING, __file__, 1, "pages of %s", ("room 7",), None, extra=extra)


def test_a_json_record_is_one_object_with_the_fields() -> None:
    room = Source(TIMES, identity=PROMPT)
    room.admit(7, None, 0.0)
    line = logs.JsonFormatter().format(record_about_a_room(**logs._fields(room)))
    assert "\n" not in line
    said = json.loads(line)
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "WARNING", "logger": "kvroom.test", "message": "pages of room 7", "room": 7, "side": "prefill",
        "phase": "EXPECTED",
    }  # fmt: skip


def test_a_json_record_holds_the_exception_in_the_same_line() -> None:
    record = record_about_a_room()
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def test_a_text_record_ends_with_the_fields() -> None:
    line = logs.TextFormatter().format(record_about_a_room(room=7, side="decode", peer=None))
    assert line.endswith("WARNING kvroom.test: pages of room 7 [room=7 side=decode]")
    assert logs.TextFormatter().format(record_about_a_room()).endswith("kvroom.test: pages of room 7")


TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}\+00:00")


def test_both_formats_begin_with_the_same_time_and_its_zone() -> None:
    record = record_about_a_room()
    text, as_json = logs.TextFormatter().format(record), json.loads(logs.JsonFormatter().format(record))
    assert TIME.fullmatch(text.split()[0])
    assert text.split()[0] == as_json["time"]


@pytest.mark.parametrize("end", ["\n", "\r", "\x1b", "\u2028", "\x85", "\x00"])
def test_a_quoted_client_cannot_forge_a_line_of_the_text_log(end: str) -> None:
    record = record_about_a_room()
    record.args = (f"a{end}2026-01-01 ERROR kvroom: forged",)
    line = logs.TextFormatter().format(record)
    assert end not in line
    assert line.splitlines() == [line]


def test_a_record_names_the_request_of_its_room() -> None:
    room = Source(TIMES, identity=PROMPT)
    room.admit(7, None, 0.0)
    room.trace = RequestTrace("client-7", None)
    record = record_about_a_room(**logs._fields(room))
    assert logs.TextFormatter().format(record).endswith("[room=7 side=prefill phase=EXPECTED request_id=client-7]")
    assert json.loads(logs.JsonFormatter().format(record))["request_id"] == "client-7"


def test_a_second_pool_is_another_manager_with_its_own_numbers(pair: Pair) -> None:
    hand_over(pair, 1)
    with contextlib.closing(TestPool()) as pool, KVManager(pool.layout, transport="memory") as manager:
        assert manager.metrics().counters.opened == 0
        assert manager.metrics().links == ()

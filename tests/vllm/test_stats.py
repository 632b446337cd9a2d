"""The reports of real managers, on vLLM's own path from a worker to the log and to Prometheus."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from identities import PROMPT
from kvroom import KVBootstrapServer, KVManager, Timeouts
from kvroom.adapters.vllm.stats import KVRoomPromMetrics, KVRoomStats, StatsTaker, spread
from kvroom.errors import ConfigurationError
from kvroom.runtime.measure import LATENCY_BOUNDS_S, HandOffs
from kvroom_lab.pools import TestPool

TRANSFER = KVTransferConfig(
    kv_connector="KVRoomConnector", kv_connector_module_path="kvroom.adapters.vllm", kv_role="kv_both"
)


class Pair:
    """A prefill and a decode manager over memory of this process."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        directory = stack.enter_context(KVBootstrapServer())
        self.addr = directory.address
        pools = TestPool(), TestPool()
        for pool in pools:
            stack.callback(pool.close)
        times = Timeouts(bootstrap_s=60, waiting_s=20, stall_s=20, drain_s=5, decline_s=1)
        self.prefill, self.decode = (
            stack.enter_context(KVManager(pool.layout, transport="memory", timeouts=times, register_with=register_with))
            for pool, register_with in zip(pools, (self.addr, None), strict=True)
        )

    def hand_over(self, room: int) -> int:
        """Run one room from start to end. Return the bytes that it moved."""
        with (
            self.prefill.sender(room, identity=PROMPT) as sender,
            self.decode.receiver(self.addr, room, identity=PROMPT) as receiver,
        ):
            receiver.send_metadata([1], tokens=1)
            sender.send([1], stop=1, last=True)
            sender.wait(20)
            return receiver.wait(20).nbytes


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


def taken(taker: StatsTaker, loaded: int = 0, sent: int = 0, now_s: float = 0.0, *, busy: bool = False) -> KVRoomStats:
    stats = taker.take(loaded, sent, now_s, busy=busy)
    assert stats is not None
    return stats


def over_the_wire(stats: KVRoomStats) -> dict[str, Any]:
    """Return a report as the API server gets it: pickled by the worker, then sent as msgpack by the engine."""
    stats = pickle.loads(pickle.dumps(stats))  # noqa: S301 - as vLLM's executor does
    sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats=stats.to_dict()))
    got = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
    assert got.scheduler_stats.kv_connector_stats == stats.data
    return got.scheduler_stats.kv_connector_stats  # type: ignore[no-any-return]


# -- taking ------------------------------------------------------------------------------------------------------------


def test_a_report_covers_the_time_since_the_last_one(pair: Pair) -> None:
    takers = StatsTaker(pair.decode), StatsTaker(pair.prefill)
    moved = [pair.hand_over(1), pair.hand_over(2)]
    first = taken(takers[0], loaded=200).data
    assert (first["ended"], first["hand_off_bytes"]) == ({"decode/": 2}, {"decode": sum(moved), "prefill": 0})
    assert (first["tokens_loaded"], first["tokens_sent"]) == (200, 0)
    assert sum(first["hand_off_counts"]["decode"]) == 2
    assert first["hand_off_s"]["decode"] == pair.decode.metrics().hand_offs["decode"].total_s > 0
    assert first["rooms_open"] == {pair.decode.address: 0}
    assert taken(takers[1], sent=200).data["ended"] == {"prefill/": 2}

    moved.append(pair.hand_over(3))
    second = taken(takers[0], loaded=300, now_s=1.0).data
    assert (second["ended"], second["hand_off_bytes"]["decode"]) == ({"decode/": 1}, moved[2])
    assert (second["tokens_loaded"], sum(second["hand_off_counts"]["decode"])) == (100, 1)
    both = KVRoomStats(first).aggregate(KVRoomStats(second)).data
    total = pair.decode.metrics().hand_offs["decode"]
    assert (both["hand_off_counts"]["decode"], both["hand_off_bytes"]["decode"]) == (total.counts, total.nbytes)
    assert both["hand_off_s"]["decode"] == pytest.approx(total.total_s, rel=1e-12)


def test_events_before_the_taker_was_created_are_reported(pair: Pair) -> None:
    pair.hand_over(1)
    assert taken(StatsTaker(pair.decode)).data["ended"] == {"decode/": 1}


def test_a_failure_has_its_cause_and_an_open_room_is_seen(pair: Pair) -> None:
    taker = StatsTaker(pair.prefill)
    with pair.prefill.sender(1, identity=PROMPT) as sender:
        assert taken(taker, now_s=0.0).data["rooms_open"] == {pair.prefill.address: 1}
        sender.abort("no longer wanted")
    stats = taken(taker, now_s=5.0)
    assert stats.data["ended"] == {"prefill/aborted": 1}
    assert not stats.is_empty()


class Asked:
    """A manager that counts the calls of `metrics`."""

    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self.address = manager.address
        self.times = 0

    def metrics(self) -> Any:
        self.times += 1
        return self._manager.metrics()


def test_a_busy_worker_asks_once_in_an_interval_whatever_it_moves(pair: Pair) -> None:
    asked: Any = Asked(pair.decode)
    taker = StatsTaker(asked, interval_s=1.0)
    for step in range(1, 100):
        taker.take(step, 0, step / 50, busy=True)
    assert asked.times == 2
    assert taken(taker, 100, 0, 2.03, busy=True).data["tokens_loaded"] > 40


def test_the_last_room_is_reported_when_the_worker_becomes_idle(pair: Pair) -> None:
    asked: Any = Asked(pair.decode)
    taker = StatsTaker(asked, interval_s=1.0)
    assert taker.take(0, 0, 0.0) is None  # nothing has happened
    assert taker.take(0, 0, 0.1, busy=True) is None
    pair.hand_over(1)
    stats = taken(taker, 7, 0, 0.2)  # a fraction of the interval later, and there may be no further step
    assert (stats.data["tokens_loaded"], stats.data["ended"]) == (7, {"decode/": 1})
    asked_until_then = asked.times
    for step in range(100):
        assert taker.take(7, 0, 0.3 + step / 1000) is None
    assert asked.times == asked_until_then
    assert taken(taker, 8, 0, 0.5).data["tokens_loaded"] == 1  # it began and ended between two steps


def test_a_failure_that_moved_no_token_is_reported_when_the_worker_becomes_idle(pair: Pair) -> None:
    taker = StatsTaker(pair.prefill)
    assert taker.take(0, 0, 0.0) is None
    with pair.prefill.sender(1, identity=PROMPT) as sender:
        assert taker.take(0, 0, 0.1, busy=True) is None
        sender.abort("no longer wanted")
    assert taken(taker, now_s=0.2).data["ended"] == {"prefill/aborted": 1}


def test_nothing_new_is_no_report(pair: Pair) -> None:
    taker = StatsTaker(pair.decode)
    assert taker.take(0, 0, 0.0) is None
    pair.hand_over(1)
    taken(taker, 1, 0, 10.0)
    assert taker.take(1, 0, 20.0) is None


def test_a_closed_manager_takes_nothing(pair: Pair) -> None:
    taker = StatsTaker(pair.decode)
    pair.decode.close()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="this manager is closed"):
            taker.take(1, 0, 0.0)


# -- adding up ---------------------------------------------------------------------------------------------------------


def report(**changes: Any) -> KVRoomStats:
    stats = KVRoomStats()
    stats.data |= changes
    return stats


def test_counts_add_up_and_open_rooms_are_the_last_value_of_each_manager() -> None:
    one = report(ended={"decode/": 2, "decode/stall_timeout": 1}, tokens_loaded=10, rooms_open={"a:1": 3})
    two = report(ended={"decode/": 1, "decode/closed": 4}, tokens_loaded=5, rooms_open={"b:1": 2})
    later = report(ended={"decode/": 1}, rooms_open={"a:1": 1})
    total = one.aggregate(two).aggregate(later)
    assert total is one
    assert total.data["ended"] == {"decode/": 4, "decode/stall_timeout": 1, "decode/closed": 4}
    assert total.data["tokens_loaded"] == 15
    assert total.data["rooms_open"] == {"a:1": 1, "b:1": 2}
    assert total.reduce()["open"] == 3


def test_adding_up_does_not_change_the_reports() -> None:
    one, two = report(ended={"decode/": 1}), report(ended={"decode/": 1})
    before = one.data
    KVRoomStats(one.data).aggregate(two).aggregate(two)
    assert one.data is before
    assert (one.data["ended"], two.data["ended"]) == ({"decode/": 1}, {"decode/": 1})


def test_empty_is_when_nothing_happened_and_nothing_is_open() -> None:
    assert KVRoomStats().is_empty()
    assert KVRoomStats({}).is_empty()
    assert report(rooms_open={"a:1": 0}).is_empty()
    for change in ({"rooms_open": {"a:1": 1}}, {"tokens_sent": 1}, {"ended": {"decode/limit": 1}},
                   {"quarantined_pages": {"a:1": 1}}):  # fmt: skip
        stats = report(**change)
        assert not stats.is_empty()
        stats.reset()
        assert stats.is_empty()


def test_vllm_sums_the_ranks_of_an_engine(pair: Pair) -> None:
    pair.hand_over(1)
    ranks = [taken(StatsTaker(pair.decode), loaded=5), taken(StatsTaker(pair.prefill))]
    outputs: list[Any] = [
        ModelRunnerOutput(
            req_ids=[], req_id_to_index={}, kv_connector_output=KVConnectorOutput(kv_connector_stats=stats)
        )
        for stats in ranks
    ]
    summed = KVOutputAggregator(expected_finished_count=2).aggregate(outputs).kv_connector_output.kv_connector_stats
    assert isinstance(summed, KVRoomStats)
    assert summed.data["ended"] == {"decode/": 1, "prefill/": 1}
    assert summed.data["rooms_open"] == {pair.decode.address: 0, pair.prefill.address: 0}


# -- the log -----------------------------------------------------------------------------------------------------------


def test_the_log_line_has_the_figures_of_an_interval(pair: Pair) -> None:
    logging, lines = KVConnectorLogging(TRANSFER), []
    taker = StatsTaker(pair.decode)
    moved = pair.hand_over(1)
    logging.observe(over_the_wire(taken(taker, loaded=128)))
    moved += pair.hand_over(2)
    logging.observe(over_the_wire(taken(taker, loaded=256, now_s=1.0)))
    logging.log(lambda line, text: lines.append(line % text))
    took_ms = round(1e3 * pair.decode.metrics().hand_offs["decode"].total_s / 2, 3)
    (line,) = lines
    assert line.startswith(
        f"KV Transfer metrics: Rooms handed over=2, failed=0, tokens loaded=256, tokens sent=0, "
        f"MB={round(moved / 1e6, 3)}, mean hand-off (ms)={took_ms}, p50 hand-off (ms)="
    )
    assert line.endswith(", open=0")
    logging.log(lambda line, text: lines.append(line % text))
    assert len(lines) == 1  # nothing has happened since


def test_failures_are_told_by_cause_and_without_hand_offs_there_is_no_latency() -> None:
    said = report(
        ended={"decode/link_lost": 2, "prefill/link_lost": 1, "decode/aborted": 1},
        quarantined_pages={"a:1": 4, "b:1": 1},
        hand_off_bytes={"decode": 35_400_000, "prefill": 400_000},
    ).reduce()
    assert said == {
        "Rooms handed over": 0, "failed": 4, "failed by aborted": 1, "failed by link_lost": 3, "tokens loaded": 0,
        "tokens sent": 0, "MB": 35.8, "open": 0, "quarantined pages": 5,
    }  # fmt: skip


# -- Prometheus --------------------------------------------------------------------------------------------------------


class Prom:
    """vLLM's own path to the metrics of the connector, with a registry of the test, for two engines."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        class WithRegistry(KVConnectorProm):  # type: ignore[misc]
            _gauge_cls = partial(Gauge, registry=self.registry)
            _counter_cls = partial(Counter, registry=self.registry)
            _histogram_cls = partial(Histogram, registry=self.registry)

        config = SimpleNamespace(kv_transfer_config=TRANSFER)
        self._prom = WithRegistry(config, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
        assert isinstance(self._prom.prom_metrics, KVRoomPromMetrics)

    def observe(self, data: dict[str, Any], engine: int = 0) -> None:
        self._prom.observe(data, engine)

    def of(self, name: str, engine: int = 0, **labels: str) -> float:
        value = self.registry.get_sample_value(name, {"model_name": "m", "engine": str(engine), **labels})
        assert value is not None, f"{name} {labels} is not there"
        return value


def test_prometheus_gets_the_counts_of_the_managers(pair: Pair) -> None:
    prom, taker = Prom(), StatsTaker(pair.decode)
    moved = 0
    for room in (1, 2, 3):
        moved += pair.hand_over(room)
        prom.observe(over_the_wire(taken(taker, loaded=room * 100, now_s=room)))
    with pair.decode.receiver(pair.addr, 4, identity=PROMPT) as receiver:
        prom.observe(over_the_wire(taken(taker, loaded=300, now_s=10)))
        assert prom.of("vllm:kvroom_rooms_open") == 1
        receiver.abort("no longer wanted")
    prom.observe(over_the_wire(taken(taker, loaded=300, now_s=20)))
    assert prom.of("vllm:kvroom_rooms_open") == 0
    assert prom.of("vllm:kvroom_tokens_loaded_total") == 300
    assert prom.of("vllm:kvroom_tokens_sent_total") == 0
    assert prom.of("vllm:kvroom_handoff_bytes_total", side="decode") == moved
    assert prom.of("vllm:kvroom_rooms_ended_total", side="decode", outcome="succeeded", cause="") == 3
    assert prom.of("vllm:kvroom_rooms_ended_total", side="decode", outcome="failed", cause="aborted") == 1
    counted = pair.decode.metrics().hand_offs["decode"]
    assert prom.of("vllm:kvroom_handoff_seconds_sum", side="decode") == pytest.approx(counted.total_s, rel=1e-9)
    assert prom.of("vllm:kvroom_handoff_seconds_count", side="decode") == 3
    for index, bound_s in enumerate(LATENCY_BOUNDS_S):
        below = prom.of("vllm:kvroom_handoff_seconds_bucket", side="decode", le=str(bound_s))
        assert below == sum(counted.counts[: index + 1])


def test_engines_are_apart_and_the_managers_of_one_add_up() -> None:
    prom = Prom()
    prom.observe(report(tokens_sent=1, rooms_open={"a:1": 2, "b:1": 1}, quarantined_pages={"a:1": 5}).data, 0)
    prom.observe(report(tokens_sent=10, rooms_open={"c:1": 7}).data, 1)
    prom.observe(report(tokens_sent=1, rooms_open={"b:1": 0}).data, 0)
    assert [prom.of("vllm:kvroom_tokens_sent_total", engine) for engine in (0, 1)] == [2, 10]
    assert [prom.of("vllm:kvroom_rooms_open", engine) for engine in (0, 1)] == [2, 7]
    assert [prom.of("vllm:kvroom_quarantined_pages", engine) for engine in (0, 1)] == [5, 0]


def test_every_label_is_there_before_anything_has_happened(pair: Pair) -> None:
    prom = Prom()
    names = {(sample.name, frozenset(sample.labels.items()))
             for family in prom.registry.collect() for sample in family.samples}  # fmt: skip
    pair.hand_over(1)
    prom.observe(taken(StatsTaker(pair.decode), loaded=5).data)
    assert names == {(sample.name, frozenset(sample.labels.items()))
                     for family in prom.registry.collect() for sample in family.samples}  # fmt: skip


# -- the values of a histogram -----------------------------------------------------------------------------------------

MANY = (
    [0.003],
    [0.0],
    [LATENCY_BOUNDS_S[0], LATENCY_BOUNDS_S[3], LATENCY_BOUNDS_S[-1]],
    [0.00011, 0.0002, 0.00015, 0.9, 1.2, 1.3],
    [20.0],
    [13.2, 0.19, 0.19, 0.19],
    [14.0, 600.0, 0.5, 0.0001],
)


@pytest.mark.parametrize("latencies_s", MANY, ids=str)
def test_a_histogram_gets_the_same_buckets_and_the_same_sum(latencies_s: list[float]) -> None:
    counted = HandOffs()
    for latency_s in latencies_s:
        counted.note(latency_s, 1)
    again = HandOffs()
    for latency_s in spread(counted.counts, counted.total_s):
        again.note(latency_s, 1)
    assert again.counts == counted.counts
    assert math.isclose(again.total_s, counted.total_s, rel_tol=1e-9, abs_tol=1e-12)


def test_the_log_tells_the_median_as_exactly_as_buckets_can() -> None:
    counted = HandOffs()
    for latency_s in (0.001, 0.001, 0.0304, 0.9, 0.9):
        counted.note(latency_s, 1)
    said = report(hand_off_counts={"decode": counted.counts, "prefill": HandOffs().counts},
                  hand_off_s={"decode": counted.total_s, "prefill": 0.0}).reduce()  # fmt: skip
    assert said["mean hand-off (ms)"] == round(1e3 * counted.total_s / 5, 3)
    assert 25.6 < said["p50 hand-off (ms)"] <= 51.2


def test_one_latency_is_observed_unchanged() -> None:
    counted = HandOffs()
    counted.note(0.0123, 1)
    assert spread(counted.counts, counted.total_s) == [pytest.approx(0.0123)]
    assert spread(HandOffs().counts, 0.0) == []

"""The counts of a worker's manager, in the form that vLLM carries from its workers to its log and to `/metrics`.

Counters are summed over time and ranks: a report contains what has happened since the previous one. Gauges are keyed by
manager address: the newest value replaces the old one, and only the managers are summed. A report consists of plain
dicts, lists and numbers, because vLLM sends it as msgpack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvroom import LATENCY_BOUNDS_S, Cause, KVManager

Data = dict[str, Any]

SIDES = ("decode", "prefill")
_COUNTED = ("tokens_loaded", "tokens_sent", "ended", "hand_off_counts", "hand_off_s", "hand_off_bytes")
_MOMENTARY = ("rooms_open", "quarantined_pages")


class KVRoomStats(KVConnectorStats):
    """The counts of one or more workers for one interval. `data` always has all of these keys:

    - `tokens_loaded`, `tokens_sent`: the workers' own counts.
    - `ended`: rooms by "side/cause", as in "decode/link_lost"; an empty cause means success.
    - `hand_off_counts`: the successful hand-offs of each side, for each bucket of `LATENCY_BOUNDS_S` and above.
    - `hand_off_s`, `hand_off_bytes`: the seconds and bytes of these hand-offs, by side.
    - `rooms_open`, `quarantined_pages`: the values at the end of the interval, by manager.
    """

    def __init__(self, data: Data | None = None) -> None:
        super().__init__(data=data or _nothing())

    def reset(self) -> None:
        """Set all counts to zero."""
        self.data = _nothing()

    def is_empty(self) -> bool:
        """Return True if nothing has happened and nothing is open."""
        return not any(_numbers(self.data))

    def aggregate(self, other: KVConnectorStats) -> KVRoomStats:
        """Add a report of another worker, or a later one of the same worker. Return this object."""
        self.data = {
            **{name: _combined(self.data[name], other.data[name]) for name in _COUNTED},
            **{name: {**self.data[name], **other.data[name]} for name in _MOMENTARY},
        }
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the figures for vLLM's log. The median is as exact as the buckets, whose widths double."""
        failed: dict[str, int] = {}
        for key, count in self.data["ended"].items():
            cause = key.partition("/")[2]
            failed[cause] = failed.get(cause, 0) + count
        rooms = failed.pop("", 0)
        figures: dict[str, int | float] = {"Rooms handed over": rooms, "failed": sum(failed.values())}
        figures |= {f"failed by {cause}": count for cause, count in sorted(failed.items()) if count}
        figures["tokens loaded"] = self.data["tokens_loaded"]
        figures["tokens sent"] = self.data["tokens_sent"]
        figures["MB"] = round(sum(self.data["hand_off_bytes"].values()) / 1e6, 3)
        if took_s := [one_s for side in SIDES for one_s in _hand_offs(self.data, side)]:
            figures["mean hand-off (ms)"] = round(1e3 * sum(took_s) / len(took_s), 3)
            figures["p50 hand-off (ms)"] = round(1e3 * median(took_s), 3)
        figures["open"] = sum(self.data["rooms_open"].values())
        if pages := sum(self.data["quarantined_pages"].values()):
            figures["quarantined pages"] = pages
        return figures


class StatsTaker:
    """The source of one worker's reports, each of which continues where the last one ended.

    It reads the manager at most once per `interval_s` while the worker is busy, and once more when the worker becomes
    idle: an idle engine takes no further step in which its last rooms could be reported.
    """

    def __init__(self, manager: KVManager, *, interval_s: float = 1.0) -> None:
        self._manager = manager
        self._interval_s = interval_s
        self._next_at = -math.inf
        self._stirred = False  # True if something may have happened since the manager was read
        self._reported = {**_nothing(), **{name: {manager.address: 0} for name in _MOMENTARY}}

    def take(self, tokens_loaded: int, tokens_sent: int, now_s: float, *, busy: bool = False) -> KVRoomStats | None:
        """Return a report, or None if nothing is new or it is too early. Called in every step, in one thread.

        Args:
            tokens_loaded: This worker's total since its start. The ranks of an engine move parts of the same tokens, so
                one rank counts and the others pass 0.
            tokens_sent: Likewise.
            now_s: A monotonic time in seconds.
            busy: True if a request of this worker waits for a room.

        Raises:
            ConfigurationError: The manager is closed. The state is unchanged then.
        """
        moved = (tokens_loaded, tokens_sent) != (self._reported["tokens_loaded"], self._reported["tokens_sent"])
        self._stirred = self._stirred or busy or moved
        if now_s < self._next_at and (busy or not self._stirred):
            return None
        address, metrics = self._manager.address, self._manager.metrics()
        now: Data = {
            "tokens_loaded": tokens_loaded,
            "tokens_sent": tokens_sent,
            "ended": {
                f"{ending.side.value}/{ending.cause.value if ending.cause else ''}": count
                for ending, count in metrics.counters.ended.items()
            },
            "hand_off_counts": {side: metrics.hand_offs[side].counts for side in SIDES},
            "hand_off_s": {side: metrics.hand_offs[side].total_s for side in SIDES},
            "hand_off_bytes": {side: metrics.hand_offs[side].nbytes for side in SIDES},
            "rooms_open": {address: metrics.census.kept},
            "quarantined_pages": {address: metrics.census.quarantined_pages},
        }
        self._next_at, self._stirred = now_s + self._interval_s, busy
        if now == self._reported:
            return None
        before, self._reported = self._reported, now
        return KVRoomStats({**now, **{name: _combined(now[name], before[name], -1) for name in _COUNTED}})


class KVRoomPromMetrics(KVConnectorPromMetrics):
    """The same counts on vLLM's `/metrics`, for each engine behind this API server."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        ended = self._counter(
            "rooms_ended", "Rooms that ended, with the cause of a failure.", "side", "outcome", "cause"
        )
        loaded = self._counter("tokens_loaded", "Prompt tokens that came from another engine.")
        sent = self._counter("tokens_sent", "Prompt tokens that another engine has taken.")
        nbytes = self._counter("handoff_bytes", "Bytes moved by successful hand-offs.", "side")
        seconds = self._histogram_cls(
            name="vllm:kvroom_handoff_seconds",
            documentation="Successful hand-offs: from both sides being ready to the last byte.",
            buckets=list(LATENCY_BOUNDS_S),
            labelnames=[*labelnames, "side"],
        )
        open_now = self._gauge("rooms_open", "Rooms kept now.")
        overdue = self._gauge("quarantined_pages", "Pages of given-up rooms whose drain is overdue.")
        self._engines: dict[int, _EngineMetrics] = {}
        for index, values in per_engine_labelvalues.items():
            engine = dict(zip(labelnames, values, strict=True))
            self._engines[index] = _EngineMetrics(
                tokens={"tokens_loaded": loaded.labels(**engine), "tokens_sent": sent.labels(**engine)},
                ended={
                    f"{side}/{cause}": ended.labels(
                        **engine, side=side, outcome="failed" if cause else "succeeded", cause=cause
                    )
                    for side in SIDES
                    for cause in ("", *(cause.value for cause in Cause))
                },
                nbytes={side: nbytes.labels(**engine, side=side) for side in SIDES},
                seconds={side: seconds.labels(**engine, side=side) for side in SIDES},
                gauges={"rooms_open": open_now.labels(**engine), "quarantined_pages": overdue.labels(**engine)},
            )

    def observe(self, transfer_stats_data: Data, engine_idx: int = 0) -> None:
        """Add one report of an engine, which is summed over its ranks."""
        self._engines[engine_idx].observe(transfer_stats_data)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return self._counter_cls(
            name=f"vllm:kvroom_{name}", documentation=text, labelnames=[*self._labelnames, *labels]
        )

    def _gauge(self, name: str, text: str) -> Any:
        return self._gauge_cls(
            name=f"vllm:kvroom_{name}", documentation=text, multiprocess_mode="mostrecent", labelnames=self._labelnames
        )


class _EngineMetrics:
    """The metrics of one engine. Each dict has the keys of the corresponding part of a report."""

    def __init__(
        self,
        *,
        tokens: dict[str, Any],
        ended: dict[str, Any],
        nbytes: dict[str, Any],
        seconds: dict[str, Any],
        gauges: dict[str, Any],
    ) -> None:
        self._tokens = tokens
        self._ended = ended
        self._nbytes = nbytes
        self._seconds = seconds
        self._gauges = gauges
        self._now: dict[str, dict[str, int]] = {name: {} for name in gauges}  # the last value of each manager

    def observe(self, data: Data) -> None:
        for name, counter in self._tokens.items():
            counter.inc(data[name])
        for key, count in data["ended"].items():
            self._ended[key].inc(count)
        for side in SIDES:
            self._nbytes[side].inc(data["hand_off_bytes"][side])
            for took_s in _hand_offs(data, side):
                self._seconds[side].observe(took_s)
        for name, gauge in self._gauges.items():
            self._now[name] |= data[name]
            gauge.set(sum(self._now[name].values()))


def _nothing() -> Data:
    return {
        "tokens_loaded": 0,
        "tokens_sent": 0,
        "ended": {},
        "hand_off_counts": {side: [0] * (len(LATENCY_BOUNDS_S) + 1) for side in SIDES},
        "hand_off_s": dict.fromkeys(SIDES, 0.0),
        "hand_off_bytes": dict.fromkeys(SIDES, 0),
        "rooms_open": {},
        "quarantined_pages": {},
    }


def _combined(ours: Any, theirs: Any, sign: int = 1) -> Any:
    """Return the element-wise `ours + sign * theirs` of lists or dicts; a missing number counts as 0."""
    if isinstance(ours, dict):
        return {key: _combined(ours.get(key, 0), theirs.get(key, 0), sign) for key in {**ours, **theirs}}
    if isinstance(ours, list):
        return [_combined(one, other, sign) for one, other in zip(ours, theirs, strict=True)]
    return ours + sign * theirs


def _numbers(data: Any) -> Iterator[float]:
    """Yield every number in nested dicts and lists."""
    if isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _numbers(part)
    else:
        yield data


def _hand_offs(data: Data, side: str) -> list[float]:
    return spread(data["hand_off_counts"][side], data["hand_off_s"][side])


def spread(counts: Sequence[int], total_s: float) -> list[float]:
    """Return sorted latencies that fall into the counted buckets and have the given sum.

    A histogram of `prometheus_client` accepts only single values, and exposes only their buckets and sum.
    """
    lows = (0.0, *LATENCY_BOUNDS_S)
    above = counts[-1]
    least_s = sum(count * low for count, low in zip(counts[:-1], lows, strict=False))
    width_s = sum(count * (high - low) for count, low, high in zip(counts, lows, LATENCY_BOUNDS_S, strict=False))
    # If there are values above the last bound, they alone make up the difference to the sum.
    share = 0.0 if above or not width_s else min(max((total_s - least_s) / width_s, 0.0), 1.0)
    found = []
    for count, low, high in zip(counts, lows, LATENCY_BOUNDS_S, strict=False):
        found += [min(max(low + share * (high - low), math.nextafter(low, math.inf)), high)] * count
    if above:
        found += [max((total_s - least_s) / above, math.nextafter(lows[-1], math.inf))] * above
    return found

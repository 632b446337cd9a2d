"""The metrics of a manager in the formats of Prometheus. Nothing is kept here: each scrape formats one snapshot.

Every label has a closed set of values except `peer`, which has one for each link and loses it when the link is
forgotten. A scrape costs the same with one room open as with a million, and without scrapes there is no cost.
Importing this module needs `prometheus_client`, which the rest of the library does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvroom.core.causes import Cause
from kvroom.core.counts import Census, Counters, Ending
from kvroom.core.phases import SINK, SOURCE, Phase, Side
from kvroom.runtime.measure import LATENCY_BOUNDS_S, Metrics

WAITS_FOR = {Side.SINK: "writer", Side.SOURCE: "transfers"}
"""By side, what must be proven to have ended before the pages of a quarantined room come back."""
PHASES = {Side.SINK: tuple(SINK), Side.SOURCE: tuple(SOURCE)}


class MetricsPage:
    """The text of `/metrics`: the metrics of `families`, called at each scrape, and those of the process.

    Args:
        families: returns the metric families, such as `manager_families` of a fresh snapshot. Called in the thread that
            calls `render`.
    """

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Families(families))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the page and its content type. Blocks for as long as `families` does.

        Args:
            accept: the `Accept` header of the request, which selects the format.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering this collector takes no snapshot."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the families of one snapshot."""
        return self._families()


def manager_families(now: Metrics) -> Iterator[Metric]:
    """Yield the metric families of a manager: rooms, hand-offs, messages, links.

    Args:
        now: the snapshot, from `KVManager.metrics`.
    """
    yield from _rooms(now.census, now.counters)
    took = "Successful hand-offs: from both sides being ready to the last byte, on the source's clock."
    seconds = HistogramMetricFamily("kvroom_handoff_seconds", took, labels=["side"])
    nbytes = CounterMetricFamily("kvroom_handoff_bytes", "Bytes moved by successful hand-offs.", labels=["side"])
    bounds = [*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf"]
    for side, sums in now.hand_offs.items():
        seconds.add_metric([side], list(zip(bounds, accumulate(sums.counts), strict=True)), sums.total_s)
        nbytes.add_metric([side], sums.nbytes)
    yield seconds
    yield nbytes
    counters = now.counters
    for name, value, text in (
        ("rooms_opened", counters.opened, "Rooms opened, both sides together."),
        ("rooms_refused", counters.rooms_refused, "Rooms not opened: the number was in use, or the table full."),
        ("early_arrivals_kept", counters.early_arrivals, "Offers kept for rooms that were not yet open here."),
        ("early_arrivals_refused", counters.early_refused, "Early offers refused: a limit, or a second for one room."),
        ("early_arrivals_expired", counters.early_expired, "Early offers whose room was not opened in time."),
        ("lease_renewals", counters.renewals, "Renewals of the lease of a room that was open here."),
        ("late_messages", counters.late_messages, "Messages ignored: their room or generation is not open."),
        (
            "overtaken_messages",
            counters.overtaken_messages,
            "Messages ignored: a newer one of that peer was read before.",
        ),
        ("links_lost", now.links_lost, "Links that were up and ended."),
        ("connections_refused", now.connections_refused, "Connections that ended before they became links."),
    ):
        yield CounterMetricFamily(f"kvroom_{name}", text, value=value)
    state = "1: linked. 0: lost, and a room still waits for proof that this peer writes no longer."
    up = GaugeMetricFamily("kvroom_link_up", state, labels=["peer", "transport"])
    for link in now.links:
        up.add_metric([link.peer, link.transport], link.up)
    yield up
    proven = "Lost peers that were proven to write no longer, by the source of the proof."
    fenced = CounterMetricFamily("kvroom_peers_fenced", proven, labels=["proof"])
    for proof, peers in now.fenced.items():
        fenced.add_metric([proof], peers)
    yield fenced
    held = "Staging slots of the transport in use by transfers in flight, by state."
    staging = GaugeMetricFamily("kvroom_staging_slots", held, labels=["state"])
    for state, slots in now.staging_slots.items():
        staging.add_metric([state], slots)
    yield staging


def _rooms(census: Census, counters: Counters) -> Iterator[Metric]:
    rooms = GaugeMetricFamily("kvroom_rooms", "Rooms kept now.", labels=["side", "phase"])
    for side, phases in PHASES.items():
        for phase in phases:
            if phase is not Phase.NEW:  # a room without a number is not in the table
                rooms.add_metric([side.value, phase.name], census.rooms[side][phase])
    yield rooms
    text = "Pages in quarantine, by the cause of the room's failure and by what must be proven to have ended."
    overdue = GaugeMetricFamily("kvroom_quarantined_pages", text, labels=["side", "cause", "waits_for"])
    for side, waits_for in WAITS_FOR.items():
        for cause in Cause:
            overdue.add_metric([side.value, cause.value, waits_for], census.quarantined.get(Ending(side, cause), 0))
    yield overdue
    early = "Offers and declines that wait for their room to be opened."
    yield GaugeMetricFamily("kvroom_early_arrivals", early, value=census.early_arrivals)
    ended = CounterMetricFamily(
        "kvroom_rooms_ended", "Rooms that ended, with the cause of a failure.", labels=["side", "outcome", "cause"]
    )
    for side in PHASES:
        ended.add_metric([side.value, "succeeded", ""], counters.ended.get(Ending(side, None), 0))
        for cause in Cause:
            ended.add_metric([side.value, "failed", cause.value], counters.ended.get(Ending(side, cause), 0))
    yield ended

"""What a manager counts, as Prometheus reads it. Nothing is kept here: each scrape reads one snapshot and writes it.

Every label has a closed set of values, but `peer`, which has one for each link: it goes when the link is forgotten.
A scrape costs the same with one room open as with a million, and nothing at all while nobody scrapes.
Importing this needs `prometheus_client`, which the library itself does without.
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
"""The thing whose end has to be proven before the pages of a quarantined room come back, by side."""
PHASES = {Side.SINK: tuple(SINK), Side.SOURCE: tuple(SOURCE)}


class MetricsPage:
    """The text of `/metrics`: what `families` says when it is called, and what the process uses."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Families(families))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, in the format that `accept` (an HTTP header) asks for. Blocks for a moment."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering is no scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One snapshot, family by family."""
        return self._families()


def manager_families(now: Metrics) -> Iterator[Metric]:
    """What a manager counts: rooms, hand-offs, messages, links."""
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
        ("early_arrivals_kept", counters.early_arrivals, "Offers kept for rooms that were not open here yet."),
        ("early_arrivals_refused", counters.early_refused, "Early offers refused: a limit, or a second for one room."),
        ("early_arrivals_expired", counters.early_expired, "Early offers whose room was not opened in time."),
        ("lease_renewals", counters.renewals, "Renewals of the lease of a room that was open here."),
        ("late_messages", counters.late_messages, "Messages ignored: their room or generation is not open."),
        ("overtaken_messages", counters.overtaken_messages, "Messages ignored: the peer had said something newer."),
        ("links_lost", now.links_lost, "Links that were up and ended."),
        ("connections_refused", now.connections_refused, "Connections that ended before they became links."),
    ):
        yield CounterMetricFamily(f"kvroom_{name}", text, value=value)
    state = "1: linked. 0: lost, and a room still waits for proof that this peer writes no more."
    up = GaugeMetricFamily("kvroom_link_up", state, labels=["peer", "transport"])
    for link in now.links:
        up.add_metric([link.peer, link.transport], link.up)
    yield up
    proven = "Lost peers that were proven to write no more, by whose word."
    fenced = CounterMetricFamily("kvroom_peers_fenced", proven, labels=["proof"])
    for proof, peers in now.fenced.items():
        fenced.add_metric([proof], peers)
    yield fenced
    held = "Slots of the transport's staging area that hold small blocks on their way, by what they wait for."
    staging = GaugeMetricFamily("kvroom_staging_slots", held, labels=["state"])
    for state, slots in now.staging_slots.items():
        staging.add_metric([state], slots)
    yield staging


def _rooms(census: Census, counters: Counters) -> Iterator[Metric]:
    rooms = GaugeMetricFamily("kvroom_rooms", "Rooms kept now.", labels=["side", "phase"])
    for side, phases in PHASES.items():
        for phase in phases:
            if phase is not Phase.NEW:  # such a room has no number, and is in no table
                rooms.add_metric([side.value, phase.name], census.rooms[side][phase])
    yield rooms
    text = "Pages of rooms that were given up and whose drain is overdue, by cause, and what has to be proven to end."
    overdue = GaugeMetricFamily("kvroom_quarantined_pages", text, labels=["side", "cause", "waits_for"])
    for side, waits_for in WAITS_FOR.items():
        for cause in Cause:
            overdue.add_metric([side.value, cause.value, waits_for], census.quarantined.get(Ending(side, cause), 0))
    yield overdue
    early = "Offers and declines that wait now for their room to be opened."
    yield GaugeMetricFamily("kvroom_early_arrivals", early, value=census.early_arrivals)
    ended = CounterMetricFamily(
        "kvroom_rooms_ended", "Rooms that ended, with the cause of a failure.", labels=["side", "outcome", "cause"]
    )
    for side in PHASES:
        ended.add_metric([side.value, "succeeded", ""], counters.ended.get(Ending(side, None), 0))
        for cause in Cause:
            ended.add_metric([side.value, "failed", cause.value], counters.ended.get(Ending(side, cause), 0))
    yield ended

"""Prometheus metrics of a worker: the requests and pages of its engine, and the rooms of its manager."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvroom.engine.loop import EngineLoad, EngineLoop
from kvroom.status import MetricsPage, manager_families


def worker_page(engine: EngineLoop, role: str) -> MetricsPage:
    """Return the page `/metrics` of one engine: its rooms, links, pool, requests, and the resources of its process."""

    def families() -> Iterator[Metric]:
        manager, load = engine.manager.metrics(), engine.load()
        yield from engine_families(role, load)
        yield from manager_families(manager)

    return MetricsPage(families)


def engine_families(role: str, load: EngineLoad) -> Iterator[Metric]:
    """Yield the metrics of an engine: requests, pages, computed tokens."""
    up = GaugeMetricFamily("kvroom_engine_up", "1 while the engine takes requests.", labels=["role"])
    up.add_metric([role], load.error is None)
    yield up
    requests = GaugeMetricFamily("kvroom_requests", "Requests here now.", labels=["state"])
    for state in ("waiting", "running", "parting"):
        requests.add_metric([state], getattr(load, state))
    yield requests
    ended = CounterMetricFamily("kvroom_requests_ended", "Requests that ended.", labels=["outcome"])
    for outcome in ("succeeded", "failed"):
        ended.add_metric([outcome], getattr(load, outcome))
    yield ended
    pages = GaugeMetricFamily("kvroom_pool_pages", "Pages of the KV pool by holder.", labels=["holder"])
    for holder in ("free", "cached", "owned", "quarantined"):
        pages.add_metric([holder], getattr(load.pool, holder))
    yield pages
    for name, value, text in (
        ("prompt_tokens_computed", load.prompt_tokens_computed, "Prompt tokens that this engine has computed."),
        ("prompt_tokens_cached", load.prompt_tokens_cached, "Prompt tokens that the prefix cache here had already."),
        ("pages_evicted", load.pages_evicted, "Cached pages that were given out for other contents."),
    ):
        yield CounterMetricFamily(f"kvroom_{name}", text, value=value)

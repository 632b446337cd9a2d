"""`/metrics` of real workers, read back as a Prometheus server reads it."""

from __future__ import annotations

import contextlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from kvroom.core.causes import Cause
from kvroom.core.counts import Census, Counters, Ending
from kvroom.core.phases import SINK, SOURCE, Phase, Side
from kvroom.engine.loop import EngineLoad
from kvroom.engine.pages import PoolCounts
from kvroom.runtime.measure import HandOffs, LinkView, Metrics
from kvroom.serve.metrics import engine_families
from kvroom.status.metrics import manager_families

from .conftest import Served
from .helpers import admin_of, look, post
from .test_contract import PATH, body_for

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    """Return every sample by name and labels, and assert that none comes twice."""
    found: Samples = {}
    for family in read_text(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def scrape(url: str) -> Samples:
    response = look(url, "/metrics")
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/plain")
    return samples(response.text)


def of(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def grown(url: str, before: Samples) -> Iterator[tuple[str, frozenset[tuple[str, str]], float]]:
    """Return the totals of rooms that have grown."""
    for (name, labels), value in scrape(url).items():
        if name == "kvroom_rooms_ended_total" and value != before.get((name, labels), 0.0):
            yield name, labels, value - before.get((name, labels), 0.0)


def test_a_served_call_is_counted_on_both_workers(served: Served) -> None:
    before = {url: scrape(url) for url in (served.prefill, served.decode)}
    response = post(served.url, PATH, {"model": "tiny", "prompt": "Hello there", "max_tokens": 3})
    assert response.status == 200
    for url, side in ((served.prefill, "prefill"), (served.decode, "decode")):
        old, new = before[url], scrape(url)

        def rise(name: str, old: Samples = old, new: Samples = new, **labels: str) -> float:
            return of(new, name, **labels) - of(old, name, **labels)

        assert rise("kvroom_rooms_opened_total") == 1
        assert rise("kvroom_rooms_ended_total", side=side, outcome="succeeded", cause="") == 1
        assert rise("kvroom_handoff_seconds_count", side=side) == 1
        assert rise("kvroom_handoff_seconds_bucket", side=side, le="+Inf") == 1
        assert 0 < rise("kvroom_handoff_seconds_sum", side=side) < 10
        assert rise("kvroom_handoff_bytes_total", side=side) > 0
        assert rise("kvroom_requests_ended_total", outcome="succeeded") == 1
        assert of(new, "kvroom_engine_up", role=side) == 1
        assert of(new, "process_resident_memory_bytes") > 1 << 20
    links = [(labels, value) for (name, labels), value in scrape(served.decode).items() if name == "kvroom_link_up"]
    assert [value for _, value in links] == [1.0] * len(links)
    assert any(("transport", "local") in labels for labels, _ in links)


def test_a_room_that_waits_is_seen_by_phase_and_its_end_by_cause(served: Served) -> None:
    before = {url: scrape(url) for url in (served.prefill, served.decode)}
    body = body_for(served, prompt="No worker decodes this")
    response = post(served.prefill, PATH, body)  # no decode worker joins: the room waits until its deadline
    assert response.status == 503
    ((_, labels, count),) = grown(served.prefill, before[served.prefill])
    assert dict(labels) == {"side": "prefill", "outcome": "failed", "cause": "bootstrap_timeout"}
    assert count == 1
    assert list(grown(served.decode, before[served.decode])) == []


def test_openmetrics_is_spoken_to_who_asks_for_it(served: Served) -> None:
    connection = http.client.HTTPConnection(urlsplit(admin_of(served.decode)).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Accept": OPENMETRICS})
        response = connection.getresponse()
        assert (response.getheader("Content-Type") or "").startswith("application/openmetrics-text")
        page = response.read().decode()
    families = {family.name for family in read_openmetrics(page)}  # type: ignore[no-untyped-call]
    assert {"kvroom_rooms", "kvroom_rooms_ended", "kvroom_handoff_seconds", "kvroom_link_up"} <= families


def metrics(**changes: Any) -> Metrics:
    rooms = {side: dict.fromkeys(Phase, 0) for side in Side}
    whole: dict[str, Any] = {
        "census": Census(rooms, {}, 0),
        "counters": Counters(),
        "hand_offs": {side.value: HandOffs() for side in Side},
        "links": (),
        "links_lost": 0,
        "connections_refused": 0,
        "staging_slots": {},
        "fenced": {"transport": 0, "machine": 0, "operator": 0},
    }
    return Metrics(**{**whole, **changes})


def families(now: Metrics) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in manager_families(now)
        for sample in family.samples
    }


def test_staging_is_told_by_state() -> None:
    told = families(metrics(staging_slots={"leased": 2, "quarantined": 0}))
    assert of(told, "kvroom_staging_slots", state="leased") == 2
    assert of(told, "kvroom_staging_slots", state="quarantined") == 0


def test_the_labels_are_the_same_whatever_has_happened() -> None:
    quiet = families(metrics())
    counters = Counters(ended={Ending(Side.SINK, cause): 3 for cause in Cause}, late_messages=5)
    busy = metrics(counters=counters)
    busy.census.rooms[Side.SINK][Phase.OFFERED] = 4
    busy.hand_offs["decode"].note(0.002, 100)
    loud = families(busy)
    assert set(loud) == set(quiet)
    assert of(loud, "kvroom_rooms", side="decode", phase="OFFERED") == 4
    assert of(loud, "kvroom_late_messages_total") == 5
    for cause in Cause:
        assert of(loud, "kvroom_rooms_ended_total", side="decode", outcome="failed", cause=cause.value) == 3
    phases = {dict(labels)["phase"] for name, labels in quiet if name == "kvroom_rooms"}
    assert phases == {phase.name for phase in {*SINK, *SOURCE} - {Phase.NEW}}


@pytest.mark.parametrize("what", ["metric", "cause"])
def test_the_manual_has_every_metric_and_every_cause(what: str) -> None:
    load = EngineLoad(
        waiting=0, running=0, parting=0, succeeded=0, failed=0, prompt_tokens_computed=0, prompt_tokens_cached=0,
        pages_evicted=0, pool=PoolCounts(1, 1, 0, 0, 0), groups={}, error=None,
    )  # fmt: skip
    page = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text()
    in_first_cells = {name for line in page.splitlines() if line.startswith("| `")
                      for name in re.findall(r"`([^`]+)`", line.split("|")[1])}  # fmt: skip
    found = [*manager_families(metrics()), *engine_families("prefill", load)]
    names = {f"{one.name}_total" if one.type == "counter" else one.name for one in found}
    if what == "metric":
        assert names == {name for name in in_first_cells if name.startswith("kvroom_")}
    else:
        assert {cause.value for cause in Cause} <= in_first_cells


def test_only_the_links_have_a_label_of_their_own_and_it_goes_with_them() -> None:
    links = (LinkView("10.0.0.1:5", "tcp", up=True), LinkView("10.0.0.2:5", "", up=False))
    with_links = families(metrics(links=links))
    assert set(with_links) - set(families(metrics())) == {
        ("kvroom_link_up", frozenset({("peer", "10.0.0.1:5"), ("transport", "tcp")})),
        ("kvroom_link_up", frozenset({("peer", "10.0.0.2:5"), ("transport", "")})),
    }
    assert of(with_links, "kvroom_link_up", peer="10.0.0.2:5", transport="") == 0


@pytest.mark.parametrize(("latency_s", "inside"), [(0.0001, "0.0001"), (0.00011, "0.0002"), (100.0, "+Inf")])
def test_a_bucket_counts_everything_up_to_its_end(latency_s: float, inside: str) -> None:
    now = metrics()
    now.hand_offs["decode"].note(latency_s, 1)
    found = families(now)
    counts = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "kvroom_handoff_seconds_bucket" and ("side", "decode") in labels
    }
    in_order = sorted(counts.items(), key=lambda one: float(one[0]))
    assert [value for _, value in in_order] == sorted(value for _, value in in_order)
    assert next(end for end, value in in_order if value) == inside
    assert of(found, "kvroom_handoff_seconds_sum", side="decode") == latency_s

"""Comparison of docs/vllm.md with the settings and metrics of the connector."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvroom.adapters.vllm.guard import TESTED
from kvroom.adapters.vllm.settings import VLLMSettings
from kvroom.adapters.vllm.stats import KVRoomPromMetrics

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "vllm.md").read_text()
OF_ANOTHER_SETTING = {
    "advertise_host": "`host`",
    "bootstrap_host": "`advertise_host`",
    "bootstrap_allow": "loopback addresses, `host`, `advertise_host`",
    "secret_file": "",
    "renew_s": "`bootstrap_s` / 6",
}


def rows(section: str) -> list[list[str]]:
    """Return the cells of the rows of a section whose first cell is code."""
    _, _, rest = PAGE.partition(f"\n## {section}\n")
    assert rest, f"there is no section {section!r}"
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_settings_is_that_of_the_code() -> None:
    page: dict[str, str] = {}
    for names, defaults, *_ in rows("Settings"):
        listed = re.findall(r"`(\w+)`", names)
        page |= dict(zip(listed, defaults.split(", ") if len(listed) > 1 else [defaults], strict=True))
    code = {}
    for field in msgspec.structs.fields(VLLMSettings):
        value = getattr(VLLMSettings(), field.name)
        shown = value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
        code[field.name] = OF_ANOTHER_SETTING[field.name] if value is None else shown
    assert page == code


def test_the_table_of_metrics_is_that_of_the_code(monkeypatch: Any) -> None:
    made: set[str] = set()

    def metric(name: str, labelnames: Sequence[str], suffix: str = "") -> None:
        labels = [label for label in labelnames if label != "engine"]
        made.add(f"{name}{suffix}" + (f"{{{', '.join(labels)}}}" if labels else ""))

    class Counter(_Metric):
        def __init__(self, *, name: str, labelnames: Sequence[str], **_: Any) -> None:
            metric(name, labelnames, "_total")

    class Other(_Metric):
        def __init__(self, *, name: str, labelnames: Sequence[str], **_: Any) -> None:
            metric(name, labelnames)

    classes = {"_counter_cls": Counter, "_gauge_cls": Other, "_histogram_cls": Other, "_labelnames": ["engine"]}
    base = KVRoomPromMetrics.__mro__[1]
    monkeypatch.setattr(base, "__init__", lambda self, *_: self.__dict__.update(classes))
    KVRoomPromMetrics(None, None, ["engine"], {0: ["0"]})
    assert {row[0].strip("`") for row in rows("Seeing what happens")} == made


class _Metric:
    """A metric that counts nothing."""

    def labels(self, **_: str) -> _Metric:
        return self


def test_the_page_names_the_versions_that_were_tested() -> None:
    assert f"**vLLM {', '.join(TESTED)}**" in PAGE

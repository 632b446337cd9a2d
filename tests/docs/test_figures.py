"""Numbers in the documentation that follow from the code: defaults, counts, rows that have to be complete."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from kvroom import Cause, LinkLimits, Timeouts, TorchCarrier
from kvroom.conformance.suite import CHECKS
from kvroom.core.settings import Limits
from kvroom.runtime.resolver import MAX_SOURCES
from kvroom.wire.handshake import VERSIONS
from kvroom_lab import simulate
from kvroom_lab.soak import command as soak

from .pages import CURRENT, ROOT, name_of, prose

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CHANGES = (ROOT / "CHANGELOG.md").read_text()
SECURITY = (ROOT / "docs" / "security.md").read_text()
DEFAULT = re.compile(r"(?:([\d.]+) x )?`(?:Timeouts\.|LinkLimits\.)?(\w+_s)` \(([\d.]+) (m?s)\b")


def defaults() -> dict[str, float]:
    """Return the defaults of all deadlines, in seconds."""
    of_the_carrier = inspect.signature(TorchCarrier).parameters["timeout_s"].default
    found = {"timeout_s": of_the_carrier}
    for settings in (Timeouts(), LinkLimits()):
        found |= {name: getattr(settings, name) for name in dir(settings) if name.endswith("_s")}
    return found


def wrong_defaults(text: str) -> list[str]:
    """Return the deadlines with another default in these words, as in "2 x `heartbeat_s` (10 s)"."""
    found = []
    for times, name, value, unit in DEFAULT.findall(" ".join(text.split())):
        seconds = float(value) * (0.001 if unit == "ms" else 1)
        if defaults().get(name, 0) * float(times or 1) != pytest.approx(seconds):
            found.append(f"{name} ({value} {unit})")
    return found


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_defaults_of_deadlines_are_those_of_the_code(page: Path) -> None:
    assert wrong_defaults(prose(page.read_text())) == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/failures.md", "heartbeat_s bootstrap_s offer_s renew_s drain_s decline_s"),
        ("docs/engine.md", "bootstrap_s waiting_s drain_s"),
        ("docs/from-sglang.md", "heartbeat_s stall_s"),
    ],
)
def test_a_page_states_the_default_of_these_deadlines(page: str, names: str) -> None:
    text = " ".join(prose((ROOT / page).read_text()).split())
    stated = set(re.findall(r"`(?:Timeouts\.|LinkLimits\.)?(\w+_s)` \([\d.]+ m?s", text))
    assert set(names.split()) - stated == set()


def test_every_cause_has_its_row() -> None:
    table = OPERATING.partition("\n| `cause` |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(cause.value for cause in Cause)


def number(pattern: str, text: str) -> int:
    """Return the number that stands for `(N)` in these words."""
    found = re.search(pattern.replace("(N)", r"([\d,]+)"), " ".join(text.split()))
    assert found, f"the words {pattern!r} are not there"
    return int(found[1].replace(",", ""))


def module(path: str) -> ModuleType:
    """Import a module of the tests."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_counts_of_planted_bugs_and_checks() -> None:
    assert number(r"Planted bugs show it: (N) in the state machines", ARCHITECTURE) == len(
        module("tests/core/mutants.py").PLANTED
    )
    assert number(r"and (N) in the driver", ARCHITECTURE) == len(module("tests/runtime/planted.py").BUGS)
    assert number(r"suite of (N) checks", README) == len(CHECKS)


def test_limits_of_early_offers_strangers_and_sources() -> None:
    limits, link = Limits(), LinkLimits()
    early, early_of_a_peer = limits.early_bytes >> 20, limits.early_bytes_per_peer >> 20
    assert f"| `LinkLimits.strangers` | {link.strangers} |" in SECURITY
    assert f"| `Limits.early_bytes`, `early_bytes_per_peer` | {early} MiB, {early_of_a_peer} MiB |" in SECURITY
    failures = " ".join((ROOT / "docs" / "failures.md").read_text().split())
    assert f"({early} MiB in all, {early_of_a_peer} MiB of one" in failures
    assert number(r"a room links with (N) of them at most", CHANGES) == MAX_SOURCES


def test_the_protocol_version_of_the_next_release() -> None:
    assert number(r"protocol version (N)\.", CHANGES) == VERSIONS[1]


def test_sizes_of_the_long_runs(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz = README.partition("make fuzz ")[2].partition("\n")[0]
    assert f"INPUTS  ?= {number('(N) malformed inputs', fuzz)}\n" in MAKEFILE
    assert f"CONNECTIONS ?= {number('(N) malformed connections', fuzz)}\n" in MAKEFILE
    for main, words in ((simulate.main, "make simulate # (N) runs"), (soak.main, "make soak # (N) rooms")):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert f"(default: {number(words, README)})" in capsys.readouterr().out


def test_a_false_default_is_found() -> None:
    assert wrong_defaults("2 x `heartbeat_s` (10 s), `offer_s` (50 ms) and `renew_s` (6 s), `none_s` (1 s)") == [
        "renew_s (6 s)",
        "none_s (1 s)",
    ]

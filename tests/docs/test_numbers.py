"""Numbers in the documents are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvroom.conformance.suite import CHECKS
from kvroom.core.settings import Limits, Timeouts
from kvroom.runtime.link import LinkLimits

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    """Return a page as one line, so that a number is found wherever the text is wrapped."""
    return " ".join((ROOT / name).read_text().split())


def test_the_readme_has_the_number_of_checks() -> None:
    assert f"conformance suite of {len(CHECKS)} checks" in page("README.md")


TIMES = Timeouts()
EARLY = Limits()
HEARTBEAT_S = LinkLimits().heartbeat_s


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docs/failures.md", f"2 x `heartbeat_s` ({2 * HEARTBEAT_S:g} s)"),
        ("docs/failures.md", f"0.9 x `bootstrap_s` ({0.9 * TIMES.bootstrap_s:g} s)"),
        ("docs/failures.md", f"`offer_s` ({TIMES.offer_s * 1000:g} ms)"),
        ("docs/failures.md", f"every `renew_s` ({TIMES.renew_s:g} s)"),
        ("docs/failures.md", f"`drain_s` ({TIMES.drain_s:g} s)"),
        ("docs/failures.md", f"`decline_s` ({TIMES.decline_s:g} s)"),
        ("docs/failures.md", f"({EARLY.early_bytes >> 20} MiB in all, {EARLY.early_bytes_per_peer >> 20} MiB of one"),
        ("docs/engine.md", f"`bootstrap_s` ({TIMES.bootstrap_s:g} s)"),
        ("docs/engine.md", f"`Timeouts.waiting_s` ({TIMES.waiting_s:g} s)"),
        ("docs/engine.md", f"`Timeouts.drain_s` ({TIMES.drain_s:g} s)"),
        ("docs/from-sglang.md", f"`LinkLimits.heartbeat_s` ({HEARTBEAT_S:g} s)"),
        ("docs/from-sglang.md", f"`Timeouts.stall_s` ({TIMES.stall_s:g} s"),
    ],
)
def test_a_default_is_stated_as_it_is(name: str, text: str) -> None:
    assert text in page(name), f"{name} does not say {text!r}"

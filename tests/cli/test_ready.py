"""A ready line is parsed back to its content, and no other line is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.cli.processes import Ready, parse_ready

WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)
KEYS = st.from_regex(r"[a-z_]+", fullmatch=True)


@given(KEYS, st.dictionaries(KEYS, WORDS, max_size=3))
def test_round_trip(role: str, facts: dict[str, str]) -> None:
    assert parse_ready(Ready(role, facts).line()) == Ready(role, facts)


@pytest.mark.parametrize(
    "line", ["", "READY", "READY\n", "READYx prefill", "ready prefill", "READY up nothing", 'READY "x']
)
def test_other_lines_are_not_taken_for_it(line: str) -> None:
    assert parse_ready(line) is None

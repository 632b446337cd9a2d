"""The reason for which a child ended is read from the end of its output, and only from there."""

from __future__ import annotations

import pytest

from kvroom.cli.last_words import LastWords

TRACEBACK = (
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in <module>',
    "    run()",
    "RuntimeError: no pages",
)
LOG = "/logs/decode-0.log"


def describe(lines: tuple[str, ...], returncode: int, log: str | None = LOG) -> str:
    words = LastWords()
    for line in lines:
        words.add(line, is_stderr=True)
    return words.describe("decode-0", returncode, log)


def test_the_error_of_a_command_is_the_reason() -> None:
    said = describe(("starting", "kvroom decode: error: no model at /x", "leaked semaphore"), 2)
    assert said == f"decode-0 ended with status 2: no model at /x; leaked semaphore (log: {LOG})"


def test_the_exception_of_a_traceback_is_the_reason() -> None:
    assert describe(("starting", *TRACEBACK), 1) == f"decode-0 ended with status 1: RuntimeError: no pages (log: {LOG})"
    deep = (TRACEBACK[0], *TRACEBACK[1:3] * 50, "ValueError: two", "lines")
    assert describe(deep, 1, None) == "decode-0 ended with status 1: ValueError: two; lines"


def test_the_later_one_of_an_error_and_an_exception_counts() -> None:
    error = "kvroom decode: error: no model at /x"
    assert "RuntimeError: no pages" in describe((error, *TRACEBACK), 1)
    assert describe((*TRACEBACK, error), 2, None) == "decode-0 ended with status 2: no model at /x"


@pytest.mark.parametrize("early", [("kvroom decode: error: early",), TRACEBACK], ids=["error", "traceback"])
@pytest.mark.parametrize(
    ("returncode", "status"),
    [(7, "ended with status 7"), (-11, "was killed by SIGSEGV"), (-64, "was killed by SIGRTMAX"), (0, "status 0")],
)
def test_a_message_before_the_end_is_not_the_reason(early: tuple[str, ...], returncode: int, status: str) -> None:
    lines = (*early, *(f"line {number}" for number in range(20)))
    first, *rest = describe(lines, returncode).splitlines()
    assert status in first
    assert first.endswith(f"(log: {LOG}); its last output:")
    assert rest == [f"  line {number}" for number in range(8, 20)]


def test_a_signal_is_named_even_if_an_error_was_printed() -> None:
    first, second = describe(("kvroom decode: error: early",), -9).splitlines()
    assert first.startswith("decode-0 was killed by SIGKILL: the kernel's out-of-memory killer is a frequent cause")
    assert second == "  kvroom decode: error: early"


def test_a_traceback_that_was_cut_off_is_shown_as_it_is() -> None:
    for lines in (TRACEBACK[:3], ("kvroom decode: error: early", *TRACEBACK[:3])):
        assert describe(lines, 1).splitlines()[1:] == [f"  {line}" for line in lines]


def test_a_signal_without_a_name_and_a_child_without_output() -> None:
    assert describe((), -40, None) == "decode-0 was killed by signal 40; it printed nothing"

"""The log of a worker on stderr, in both formats."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve.helpers import post, run, running

SIZES = ("--page-tokens", "4", "--pages", "64", "--chunk-tokens", "32", "--bootstrap-s", "0.2")
ROOM = 2**63 - 1


def log_of_a_failed_room(model_dir: Path, *arguments: str) -> list[str]:
    """Return the lines that a prefill worker logs about a room that no decode worker joins."""
    with running("prefill", "--model", str(model_dir), *SIZES, *arguments, KVROOM_SECRET="x" * 32) as worker:
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}, "bootstrap_host": "127.0.0.1",
                "bootstrap_port": int(worker.ready.facts["bootstrap_port"]), "bootstrap_room": ROOM}  # fmt: skip
        assert post(worker.url, "/generate", body).status == 503
        status, errors = worker.end()
    assert status == 0
    return [line for line in errors.splitlines() if str(ROOM) in line]


def test_json_records_can_be_filtered_by_room(model_dir: Path) -> None:
    lines = log_of_a_failed_room(model_dir, "--log-format", "json", "--log-level", "debug")
    records = [json.loads(line) for line in lines]
    of_the_room = [record for record in records if "room" in record]
    assert {record["room"] for record in of_the_room} == {ROOM}
    assert all("request_id" in record for record in records if "room" not in record)
    assert next(record["message"] for record in of_the_room if record["level"] == "DEBUG") == f"room {ROOM} is open"
    (failure,) = [record for record in records if record["level"] == "WARNING"]
    assert (failure["side"], failure["cause"]) == ("prefill", "bootstrap_timeout")
    assert failure["message"].endswith("timed out after 0.2 s (bootstrap_s) waiting for a decode worker to offer pages")


def test_text_is_the_default_and_tells_failures_only(model_dir: Path) -> None:
    (line,) = log_of_a_failed_room(model_dir)
    assert " WARNING kvroom.runtime.handles: room " in line
    assert f"[room={ROOM} side=prefill phase=RELEASED " in line
    assert re.search(r" cause=bootstrap_timeout request_id=[0-9a-f]{32}\]$", line)


@pytest.mark.parametrize("arguments", [("--log-level", "loud"), ("--log-format", "xml")])
def test_an_unknown_level_or_format_is_refused(arguments: tuple[str, str]) -> None:
    done = run("decode", *arguments)
    assert done.returncode == 2
    assert f"invalid choice: '{arguments[1]}'" in done.stderr

"""The demo passes only if every token is equal, none was computed twice and no room is left; it prints the costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvroom.cli.demo import Outcome, Streamed, passed, questions
from kvroom.errors import KVRoomError
from serve.helpers import run, save_tiny_model


def outcome(*, equal: bool = True, computed: int = 0) -> Outcome:
    return Outcome(questions()[0], Streamed(cost={"prompt_tokens_computed": computed}), equal)


def test_it_passes_only_if_everything_is_as_promised() -> None:
    assert passed([outcome(), outcome()])
    assert not passed([])
    assert not passed([outcome(), outcome(equal=False)])
    assert not passed([outcome(), outcome(computed=1)])


def test_a_stream_that_ends_with_an_error_raises() -> None:
    with pytest.raises(KVRoomError, match="planted"):
        Streamed().take({"error": {"message": "planted"}})


def test_it_runs_with_a_model_directory(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "tiny", positions=8192)
    ended = run("demo", "--model", str(directory), "--max-tokens", "8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {
        cells[1].strip(): cells[2:-1] for cells in (line.split("│") for line in ended.stdout.splitlines()) if cells[1:]
    }
    assert [cell.strip() for cell in rows["equal to transformers.generate"]] == ["yes"] * 3
    assert [cell.strip() for cell in rows["prompt tokens computed by decode"]] == ["0"] * 3
    assert rows["of these in decode's prefix cache"][0].strip() == "0"  # the first request finds an empty cache
    assert int(rows["prompt tokens"][2].strip().replace(",", "")) > 1000
    assert ended.stdout.endswith("every token equal, nothing left open\n")

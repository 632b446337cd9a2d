"""The demo passes only if every token is equal, none was computed twice and no room is left; it prints the costs."""

from __future__ import annotations

import re
import signal
import subprocess
from typing import Any

import psutil
import pytest

from kvroom.cli.demo import Findings, Outcome, Streamed, passed, questions
from kvroom.cli.exit_status import ExitStatus
from kvroom.cli.scenes import Left
from kvroom.errors import KVRoomError
from serve.helpers import END_S, command, environment, run, save_tiny_model


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


def rows_of(printed: str) -> dict[str, list[str]]:
    """Return the rows of the table of costs by their titles."""
    lines = (line.split("│") for line in printed.splitlines())
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines if cells[1:]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", positions=8192))


def test_it_runs_with_a_model_directory(model: str) -> None:
    ended = run("demo", "--no-failures", "--model", model, "--max-tokens", "8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = rows_of(ended.stdout)
    assert rows["equal to transformers.generate"] == ["yes"] * 3
    assert rows["prompt tokens computed by decode"] == ["0"] * 3
    assert rows["of these in decode's prefix cache"][0] == "0"  # the first request finds an empty cache
    assert int(rows["prompt tokens"][2].replace(",", "")) > 1000
    assert "A client leaves" not in ended.stdout
    assert ended.stdout.endswith("every token equal, nothing left open\n")


def test_both_failures_leave_nothing(model: str) -> None:
    ended = run("demo", "--model", model, "--max-tokens", "8", "--chunk-tokens", "16", "--pages", "2048")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" yes ") == 4
    table = ended.stdout.partition("what each failure left behind")[2]
    found = re.findall(r"^(client left|prefill-0 killed) +(\S+) +(\d+) +0 +0 +0 +0 +\S+ ms", table, re.MULTILINE)
    assert [(event, worker) for event, worker, _ in found] == [
        ("client left", "prefill-0"), ("client left", "decode-0"), ("prefill-0 killed", "decode-0"),
    ]  # fmt: skip
    assert all(int(before) > 0 for _, worker, before in found if worker == "decode-0")
    assert "the proof on decode-0: its transport saw that the writer's process has ended" in ended.stdout
    assert re.search(r"the client got HTTP 5\d\d \(.+\) and can send its request again", ended.stdout)
    assert re.search(r"prefill-0 was started again and serves \S+ s after it was killed", ended.stdout)
    assert ended.stdout.endswith("every token equal, nothing left open\n")


@pytest.mark.parametrize(
    "kept", [{"open_rooms": 1}, {"quarantined_pages": 1}, {"table_entries": 2}, {"is_idle": False}]
)
def test_anything_that_is_left_fails_it(kept: dict[str, Any]) -> None:
    clean = Left("client left", "decode-0", 3, 0, 0, 0, 0, 1.0, is_idle=True)
    assert Findings([outcome()], [clean]).good
    assert not Findings([outcome()], [clean, clean._replace(**kept)]).good
    assert not Findings([outcome()], [clean], {"decode-0": "a room"}).good


@pytest.mark.parametrize("moment", ["A client leaves", "prefill-0 is killed", "was killed; pages held"])
def test_ctrl_c_in_a_scene_leaves_no_process(model: str, moment: str) -> None:
    options = ("--model", model, "--max-tokens", "4", "--chunk-tokens", "16", "--pages", "2048")
    with subprocess.Popen(
        command("demo", *options), env=environment(PYTHONUNBUFFERED="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        for line in demo.stdout:
            if moment in line:
                break
        family = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=END_S)
    assert demo.returncode == ExitStatus.INTERRUPTED, errors
    assert "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=END_S)[1] == []


def test_a_worker_that_is_killed_by_hand_is_one_error(model: str) -> None:
    options = ("--model", model, "--max-tokens", "4", "--chunk-tokens", "16", "--pages", "2048")
    with subprocess.Popen(
        command("demo", *options), env=environment(PYTHONUNBUFFERED="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as demo:  # fmt: skip
        assert demo.stdout is not None
        for line in demo.stdout:
            if "A client leaves" in line:
                break
        children = psutil.Process(demo.pid).children(recursive=True)
        (victim,) = [one for one in children if "decode" in one.cmdline()]
        victim.kill()
        _, errors = demo.communicate(timeout=END_S)
    assert demo.returncode == ExitStatus.CHILD_ENDED, errors
    assert "kvroom demo: error: decode-0 was killed by SIGKILL" in errors
    assert "Traceback" not in errors

"""Tests of the test helpers: the answers that count as right, the prompts, and the doubles' refusals."""

from __future__ import annotations

from pathlib import Path

import answers
import pytest
import torch
from answers import Expected, Judge
from asking import Answer
from fleet import LOOPBACK
from servers import Server

PROMPT = (3, 1, 4)
BEST = [[(-0.1, 5), (-2.0, 9)], [(-0.70, 6), (-0.74, 9)], [(-0.2, 7), (-3.0, 9)]]


def judged(tokens: list[int], close: float, **fields: object) -> Judge:
    judge = Judge([Expected(PROMPT, [5, 6, 7], "text", BEST)], close)
    answer = Answer(200, tokens, finish="length", prompt_tokens=3)
    for name, value in fields.items():
        setattr(answer, name, value)
    judge.check(PROMPT, answer)
    return judge


@pytest.mark.parametrize("tokens", [[5, 6, 7], [5]])
def test_equal_tokens_are_right(tokens: list[int]) -> None:
    judge = judged(tokens, close=0)
    assert (judge.near, judge.compared) == ([], len(tokens))


def test_an_answer_may_part_at_a_near_tie(capsys: pytest.CaptureFixture[str]) -> None:
    judge = judged([5, 9, 1], close=0.05)
    assert judge.near == ["prompt of 3 tokens: token 1 is 9, not 6; their log probabilities are 0.040 apart"]
    assert judge.compared == 1
    assert capsys.readouterr().out.splitlines() == judge.near


@pytest.mark.parametrize(
    ("tokens", "close", "fields"),
    [
        pytest.param([5, 9, 1], 0, {}, id="a near tie where none is allowed"),
        pytest.param([9, 6, 7], 0.05, {}, id="wrong where one token is best"),
        pytest.param([5, 6, 8], 0.05, {}, id="wrong at the end"),
        pytest.param([5, 8, 8], 0.05, {}, id="neither of two near candidates"),
        pytest.param([], 0.05, {}, id="no token"),
        pytest.param([5, 6, 7], 0.05, {"status": 500}, id="an error"),
        pytest.param([5, 6, 7], 0.05, {"finish": "abort"}, id="aborted"),
        pytest.param([5, 6, 7], 0.05, {"detail": "the stream was closed before its end"}, id="cut off"),
        pytest.param([5, 6, 7], 0.05, {"prompt_tokens": 2}, id="another prompt"),
    ],
)
def test_all_else_is_wrong(tokens: list[int], close: float, fields: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match="prompt of 3 tokens"):
        judged(tokens, close, **fields)


def test_prompts_are_as_described(model: Path) -> None:
    prompts = answers.made(model)
    assert [len(prompt) for prompt in prompts] == list(answers.LENGTHS)
    assert (len(prompts), min(map(len, prompts)), max(map(len, prompts))) == (20, 1, 1500)
    assert len({prompt[:8] for prompt in prompts}) == 20
    assert answers.made(model) == prompts


def test_the_double_records_the_slots_of_tokens() -> None:
    from sgl_kernel import assign_req_to_token_pool_cpu

    table = torch.zeros(3, 5, dtype=torch.int32)
    rows, start, end = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([4, 2])
    assign_req_to_token_pool_cpu(rows, table, start, end, torch.tensor([11, 12, 13, 14, 15]), 5)
    assert table.tolist() == [[14, 15, 0, 0, 0], [0, 0, 0, 0, 0], [0, 11, 12, 13, 0]]


def test_the_double_refuses_functions_that_it_lacks() -> None:
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="verify_tree_greedy_cpu"):
        sgl_kernel.verify_tree_greedy_cpu(1, 2, three=3)
    assert not hasattr(sgl_kernel, "of_another_version")


def test_settings_reach_a_server_as_variables(tmp_path: Path) -> None:
    server = Server("decode", tmp_path, tmp_path / "log", "decode", settings={"BOOTSTRAP_S": "5", "TRANSPORT": "tcp"})
    given = {key: value for key, value in server.environment().items() if key.startswith("KVROOM_")}
    assert given == {
        "KVROOM_BOOTSTRAP_S": "5",
        "KVROOM_TRANSPORT": "tcp",
        "KVROOM_HOST": LOOPBACK,
        "KVROOM_ROOMS_HOST": LOOPBACK,
        "KVROOM_ROOMS_PORT": str(server.rooms_port),
    }
    single = Server("single", tmp_path, tmp_path / "log")
    assert not [key for key in single.environment() if key.startswith("KVROOM_")]

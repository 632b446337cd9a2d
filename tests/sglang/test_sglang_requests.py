"""The options of requests to a real pair: samples, lists, JSON, log probabilities, stop strings; and refusals."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from answers import STRUCTURED, Judge
from asking import Answer, Prompt, both, generate, new_room, read, send
from clients import run
from fleet import LOOPBACK, get
from servers import Fleet
from stories import Side, empty

pytestmark = pytest.mark.timeout(900)
TOKENS = 8
SIDES: tuple[Side, ...] = ("prefill", "decode")


@pytest.fixture(scope="module")
def some(judge: Judge) -> list[Prompt]:
    """Return three prompts of different lengths."""
    return [prompt for prompt in judge.prompts if len(prompt) in (17, 64, 129)]


def ask(
    pair: Fleet, room: Mapping[str, Any], prompts: Prompt | Sequence[Prompt], samples: int, salt: str
) -> list[Answer]:
    """Send both legs of a request that has several answers. Return the decode side's answers in its order."""
    body = {
        "input_ids": prompts, "stream": False, "extra_key": salt, **room,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, "n": samples},
    }  # fmt: skip

    async def legs() -> Any:
        return await asyncio.gather(*(send(f"{server.url}/generate", body) for server in pair.servers))

    first, (status, said) = run(legs())
    assert first[0] == 200, first[1]
    assert status == 200, said
    return [read(one) for one in said]


def is_empty(pair: Fleet) -> None:
    for server in pair.servers:
        run(empty(server))


def test_samples_of_one_prompt(pair: Fleet, judge: Judge, some: list[Prompt]) -> None:
    answers = ask(pair, new_room(pair.prefill), some[1], 3, "samples")
    assert len(answers) == 3
    for answer in answers:
        judge.check(some[1], answer)
    is_empty(pair)


@pytest.mark.sampled
@pytest.mark.parametrize("samples", [1, 2])
def test_a_list_of_prompts_counts_up_from_one_room(pair: Fleet, judge: Judge, some: list[Prompt], samples: int) -> None:
    answers = ask(pair, new_room(pair.prefill), some, samples, f"list of {samples}")
    expected = [prompt for prompt in some for _ in range(samples)]
    for prompt, answer in zip(expected, answers, strict=True):
        judge.check(prompt, answer)
    is_empty(pair)


@pytest.mark.sampled
@pytest.mark.parametrize("samples", [1, 2])
def test_a_list_of_prompts_with_a_list_of_rooms(pair: Fleet, judge: Judge, some: list[Prompt], samples: int) -> None:
    rooms = [new_room(pair.prefill) for _ in some]
    room = {key: [one[key] for one in rooms][::-1] for key in rooms[0]}
    answers = ask(pair, room, some, samples, f"rooms of {samples}")
    expected = [prompt for prompt in some for _ in range(samples)]
    for prompt, answer in zip(expected, answers, strict=True):
        judge.check(prompt, answer)
    is_empty(pair)


def test_json_follows_its_schema(pair: Fleet, structured: Answer, some: list[Prompt]) -> None:
    first, answer = run(both(pair.prefill, pair.decode, some[0], salt="schema", **STRUCTURED))
    assert first.right, first
    assert answer.right, answer
    assert answer.text == structured.text
    assert set(json.loads(answer.text)) == {"name", "years"}


def test_log_probabilities_are_those_of_the_single_server(pair: Fleet, judge: Judge, some: list[Prompt]) -> None:
    """Those of the first token come from the prefill side, in its metadata row."""
    for prompt in some:
        asked = {"return_logprob": True, "top_logprobs_num": 3}
        room = new_room(pair.prefill)
        first, answer = run(both(pair.prefill, pair.decode, prompt, room=room, salt="top", max_tokens=TOKENS, **asked))
        assert first.right, first
        judge.check(prompt, answer)
        assert len(answer.top) == TOKENS
        for got, expected in zip(answer.top, judge[prompt].best, strict=False):
            assert len(got) == 3
            assert [logprob for logprob, _ in got] == pytest.approx([one for one, _ in expected[:3]], abs=1e-4)


def test_an_answer_ends_before_its_stop_string(pair: Fleet, judge: Judge, some: list[Prompt]) -> None:
    whole = judge[some[2]].text
    stop = whole[len(whole) // 2 :][:4]
    asked = {"temperature": 0, "max_new_tokens": 64, "stop": [stop]}
    first, answer = run(both(pair.prefill, pair.decode, some[2], salt="stop", sampling_params=asked))
    assert first.right, first
    assert (answer.right, answer.finish) == (True, "stop"), answer
    assert answer.text == whole.partition(stop)[0]


@pytest.mark.sampled("tokens", "stream")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_short_answers(pair: Fleet, judge: Judge, some: list[Prompt], tokens: int, stream: bool) -> None:
    for prompt in some:
        legs = both(pair.prefill, pair.decode, prompt, salt=f"{tokens} {stream}", max_tokens=tokens, stream=stream)
        first, answer = run(legs)
        assert first.right, first
        judge.check(prompt, answer)
        assert len(answer.tokens) == tokens
    is_empty(pair)


def test_text_is_split_into_tokens_on_both_sides(pair: Fleet) -> None:
    """The text has characters that are split over several tokens."""
    text = "Żółw ślimak 龜 🐢 and the snail:"
    first, answer = run(both(pair.prefill, pair.decode, text, salt="text", max_tokens=TOKENS, stream=True))
    assert first.right, first
    assert answer.right, answer
    assert len(answer.tokens) == TOKENS
    assert first.tokens == answer.tokens[:1]


@pytest.mark.sampled("room", "side")
@pytest.mark.parametrize("room", [0, -1, 2**63, "seven", True, 1.5], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_invalid_room_numbers_are_refused(pair: Fleet, some: list[Prompt], side: Side, room: object) -> None:
    """kvroom refuses numbers out of range, and SGLang's own parsers refuse values that are not integers."""
    server = pair.prefill if side == "prefill" else pair.decode
    answer = run(generate(server.url, some[0], room={**new_room(pair.prefill), "bootstrap_room": room}))
    assert answer.status == 400, answer
    assert ("give an int of at least 1 and below 2**63" in answer.detail) == (type(room) is int)
    is_empty(pair)


@pytest.mark.parametrize(
    "address", [{"bootstrap_host": None}, {"bootstrap_host": ""}, {"bootstrap_port": 70000}], ids=str
)
def test_a_decode_server_refuses_an_address_that_is_none(
    pair: Fleet, judge: Judge, some: list[Prompt], address: dict[str, Any]
) -> None:
    answer = run(generate(pair.decode.url, some[0], room={**new_room(pair.prefill), **address}))
    assert answer.status == 400, answer
    assert "bootstrap_host is" in answer.detail
    _, answer = run(both(pair.prefill, pair.decode, some[0], salt="after", max_tokens=TOKENS))
    judge.check(some[0], answer)


def test_servers_are_healthy_and_say_so(pair: Fleet) -> None:
    for server in pair.servers:
        for path in ("/health", "/health_generate"):
            get(f"{server.url}{path}")
        run(empty(server))


def test_the_command_and_the_metrics_show_an_open_room(pair: Fleet, some: list[Prompt]) -> None:
    """The prefill leg is sent, and the decode leg is not sent yet."""
    room = new_room(pair.prefill)
    number = room["bootstrap_room"]
    windows = [f"http://{LOOPBACK}:{server.rooms_port}" for server in pair.servers]

    async def story() -> tuple[str, float]:
        leg = asyncio.create_task(generate(pair.prefill.url, some[0], room=room, salt="open"))
        await asyncio.to_thread(get, f"{windows[0]}/rooms?phase=EXPECTED&within_s=30")
        shown = await asyncio.to_thread(command, "rooms", *windows)
        kept = await asyncio.to_thread(pair.prefill.counted, "kvroom_rooms", phase="EXPECTED")
        answer = await generate(pair.decode.url, some[0], room=room, salt="open", max_tokens=1)
        assert answer.right, answer
        first = await leg
        assert first.right, first
        return shown, kept

    shown, kept = run(story())
    assert str(number) in shown
    assert "EXPECTED" in shown
    assert kept == 1
    is_empty(pair)
    assert str(number) not in command("rooms", *windows)
    assert pair.prefill.counted("kvroom_rooms") == 0


def command(*arguments: str) -> str:
    """Run kvroom's command and return its output."""
    kvroom = str(Path(sys.executable).parent / "kvroom")
    done = subprocess.run([kvroom, *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout

"""Faults on a real pair: clients leave, requests are aborted, servers die, partners are missing or wrong.

After each of them, the request ends with the right tokens or one clear error, the tables of both sides are empty, no
page is missing (SGLang's scheduler ends if its own check, when it is idle, finds one missing), and both servers answer
the next request right.

The prefill side computes chunks of 128 tokens, so that a test can act while a request waits behind another one, or
while its first chunks have moved. Over `tcp`, the default here, a transfer is held up if the process that reads it is
stopped. The decode side retracts requests at every fourth step.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from answers import Judge
from asking import both, generate, new_room
from clients import run, run_all
from servers import Fleet, Server, new_fleet, running
from stories import Moment, Side, Story, empty, until, whole

from sampling import amount

pytestmark = pytest.mark.timeout(900)
TRANSPORT = os.environ.get("PAIR_TRANSPORT", "tcp")
BOOTSTRAP_S = 12
SETTINGS = {
    "TRANSPORT": TRANSPORT, "BOOTSTRAP_S": str(BOOTSTRAP_S), "WAITING_S": "60", "STALL_S": "60", "DRAIN_S": "2",
}  # fmt: skip
MOMENTS: tuple[Moment, ...] = ("alone", "waiting", "computing", "stopped", "running")
SIDES: tuple[Side, ...] = ("prefill", "decode")
# A quick run kills servers only in the middle of a transfer, because each kill costs the start of a server.
KILLS: tuple[Moment, ...] = MOMENTS if amount(quick=0, full=1) else ("computing",)
LEAVES = [(side, moment) for side in SIDES for moment in MOMENTS if (side, moment) != ("prefill", "running")]


@pytest.fixture(scope="module")
def fragile(model: Path, logs: Path, judge: Judge) -> Iterator[Fleet]:
    """Start a pair with short deadlines, after the single server of `judge` has ended."""
    fleet = new_fleet(model, logs, "fragile", settings=SETTINGS)
    fleet.prefill.arguments = ("--chunked-prefill-size", "128")
    fleet.decode.env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "4"}
    with running(*fleet.servers):
        yield fleet


@pytest.fixture
def pair(fragile: Fleet) -> Fleet:
    """Return the pair, with all of its servers running."""
    fragile.heal()
    return fragile


def other_model(model: Path, folder: Path) -> Path:
    """Return a copy of the model with other rotary angles, so that it computes other keys and values."""
    copy = folder / "other-model"
    shutil.copytree(model, copy, copy_function=os.symlink)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    rope = config.get("rope_parameters") or config
    rope["rope_theta"] = 2 * rope["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def longest(judge: Judge) -> tuple[int, ...]:
    return judge.prompts[-1]


def short(judge: Judge) -> tuple[int, ...]:
    return judge.prompts[6]


@pytest.mark.sampled("side")
@pytest.mark.parametrize(("side", "moment"), LEAVES)
def test_a_client_leaves(side: Side, moment: Moment, pair: Fleet, judge: Judge) -> None:
    async def tell() -> None:
        story = Story(pair, judge, longest(judge))
        await story.come_to(moment, side, longest(judge))
        await story.leave(side)
        await held_until_proven(story, side, moment)
        await finish(story, side)

    asyncio.run(tell())


@pytest.mark.sampled("side")
@pytest.mark.parametrize(("side", "moment"), LEAVES)
def test_a_request_is_aborted(side: Side, moment: Moment, pair: Fleet, judge: Judge) -> None:
    async def tell() -> None:
        story = Story(pair, judge, longest(judge))
        await story.come_to(moment, side, longest(judge))
        await story.abort(side)
        await held_until_proven(story, side, moment)
        await finish(story, side)

    asyncio.run(tell())


@pytest.mark.sampled
@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("side", SIDES)
def test_a_server_is_killed(side: Side, moment: Moment, pair: Fleet, judge: Judge) -> None:
    other: Side = "decode" if side == "prefill" else "prefill"

    async def tell() -> None:
        story = Story(pair, judge, longest(judge))
        await story.come_to(moment, other if moment == "alone" else side, longest(judge))
        await asyncio.to_thread(story.server(side).kill)
        story.go_on()
        for leg in SIDES:
            story.check(leg, await story.outcome(leg))
        if story.blocker is not None:
            await story.blocker
        await empty(story.server(other))
        await asyncio.to_thread(pair.heal)
        await whole(pair, judge, short(judge))

    asyncio.run(tell())


async def held_until_proven(story: Story, side: Side, moment: Moment) -> None:
    """Check, if the prefill side is stopped, that the pages of the failed request are held while it could write them.

    Over `tcp` the decode side does the writing itself, so revoking the grant is immediate proof of the drain.
    """
    if (side, moment) != ("decode", "stopped") or TRANSPORT == "tcp":
        story.go_on()
        return
    decode = story.pair.decode
    await until(lambda: decode.rooms()["rooms"]["quarantined_pages"] > 0, lambda: f"{decode.name}: {decode.rooms()}")
    assert decode.rooms()["requests"] == {"held": 1}
    assert decode.load()["num_used_tokens"] > 0, "pages were given back although the stopped prefill side may write"
    story.go_on()


async def finish(story: Story, side: Side) -> None:
    """Check the answer to each leg, that nothing is left, and that the next request is answered."""
    await asyncio.gather(*(task for name, task in story.legs.items() if name == side), return_exceptions=True)
    for leg in SIDES:
        story.check(leg, await story.outcome(leg))
    if story.blocker is not None:
        first, answer = await story.blocker
        assert first.right, first
        story.judge.check(longest(story.judge), answer)
    await whole(story.pair, story.judge, short(story.judge))


def test_no_decode_side_comes(pair: Fleet, judge: Judge) -> None:
    room = new_room(pair.prefill)
    answer = run(generate(pair.prefill.url, short(judge), room=room))
    assert answer.status == 500
    assert f"room {room['bootstrap_room']} failed" in answer.detail
    assert f"{BOOTSTRAP_S} s" in answer.detail, answer.detail
    run(whole(pair, judge, short(judge)))


def test_no_prefill_server_is_there(pair: Fleet, judge: Judge) -> None:
    room = {**new_room(pair.prefill), "bootstrap_port": 9}
    answer = run(generate(pair.decode.url, short(judge), room=room))
    assert answer.status == 500
    assert "127.0.0.1:9" in answer.detail, answer.detail
    run(whole(pair, judge, short(judge)))


def test_the_partner_has_another_model(model: Path, logs: Path, pair: Fleet, judge: Judge) -> None:
    stranger = Server("stranger", other_model(model, logs), logs / "stranger.log", "decode", settings=SETTINGS)
    with running(stranger):
        first, answer = run(both(pair.prefill, stranger, short(judge)))
        assert (first.status, answer.status) == (500, 500), (first, answer)
        for one in (first, answer):
            assert one.detail.count("sglang/LlamaForCausalLM/") == 2, one
        run(empty(stranger))
    run(whole(pair, judge, short(judge)))


@pytest.mark.sampled
@pytest.mark.parametrize("change", ["one token", "one more", "the salt"])
def test_the_legs_are_of_different_requests(change: str, pair: Fleet, judge: Judge) -> None:
    prompt = short(judge)
    other = {"one token": (*prompt[:-1], prompt[-1] + 1), "one more": (*prompt, 5), "the salt": prompt}[change]
    theirs: dict[str, Any] = {"cache_salt": "another tenant"} if change == "the salt" else {}
    room = new_room(pair.prefill)

    async def ask() -> str:
        legs = (generate(pair.prefill.url, prompt, room=room), generate(pair.decode.url, other, room=room, **theirs))
        _, answer = await asyncio.gather(*legs)
        assert answer.status == 500, answer
        return answer.detail

    detail = run(ask())
    assert f"room {room['bootstrap_room']}" in detail
    if change == "the salt":
        assert "cache_salt is none on the prefill side and " in detail
    else:
        assert f"tokens is {len(prompt)} ids" in detail
        assert f"{len(other)} ids" in detail
    run(whole(pair, judge, prompt))


def test_requests_that_were_taken_back_end_right(pair: Fleet, judge: Judge) -> None:
    """The decode side retracts requests into host memory repeatedly, and resumes them without their room."""
    before = pair.decode.running.lines("retract")
    asked = judge.prompts[4:10]
    calls = [partial(both, pair.prefill, pair.decode, prompt, salt=f"retracted {n}") for n, prompt in enumerate(asked)]
    for prompt, (first, answer) in zip(asked, run_all(calls, 6), strict=True):
        assert first.right, first
        judge.check(prompt, answer)
    assert len(pair.decode.running.lines("retract")) > len(before), "nothing was retracted"
    run(whole(pair, judge, short(judge)))


def test_many_aborted_requests_in_a_row_leave_nothing(pair: Fleet, judge: Judge) -> None:
    """Clients leave after 0 to 0.4 s, on either side or both, eight requests at a time."""
    numbers = itertools.count()

    async def one() -> None:
        number = next(numbers)
        story = Story(pair, judge, judge.prompts[number % 12])
        for side in SIDES:
            story.begin(side)
        gone: Sequence[Side] = (SIDES, SIDES[:1], SIDES[1:])[number % 3]
        await asyncio.wait(story.legs.values(), timeout=0.1 * (number % 5))
        for side in gone:
            await story.leave(side)
        for side in SIDES:
            if side not in gone:
                story.check(side, await story.outcome(side))

    run_all([one] * amount(40, 500), 8)
    run(whole(pair, judge, short(judge)))

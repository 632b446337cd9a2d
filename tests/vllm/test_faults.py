"""Faults between two real servers: each request ends as the operator's policy demands.

It ends with the right tokens, or with an error whose reason and room are in the log. Afterwards no server that is left
holds a block or a room, and each of them serves the next request.

The prefill server has a decode server of each `kv_load_failure_policy`. A quick run draws one of the two for each
fault, and one of the servers that are stopped or killed.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from clients import NEW_TOKENS, Answer, run
from fixtures import Truth
from fleet import LOOPBACK, Pair, Server
from scenes import Scene, Tasks, until
from sets import LEASE_S, POLICIES, Garage

from kvroom.cli.ports import free_port

SERVERS = "faults"
pytestmark = [pytest.mark.timeout(1500), pytest.mark.sampled()]
CROSSING = 0
"""The number of a long prompt that fills 6 blocks. Its answer needs a seventh: two requests exceed 12 blocks."""
AGES = 600
"""The number of tokens in a request whose client leaves before it has them all."""
NEXT_TOKENS = 8
NOISE = re.compile("Traceback|internal error in the connector|EngineDeadError|AssertionError")


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(garage: Garage, policy: str) -> Pair:
    servers = garage.take(SERVERS)
    return Pair(servers["prefill"], servers[policy])


@pytest.fixture
def scene(pair: Pair, policy: str, truth: Truth) -> Iterator[Scene]:
    """Yield the pair. After each test, check that nothing is left, no log has a traceback, and a request succeeds."""
    seen = [len(server.log.read_text(errors="replace")) for server in pair.servers]
    scene = Scene(pair, policy, truth)
    yield scene
    scene.nothing_is_left()
    answer = run(scene.in_turn(truth.short[4], max_tokens=NEXT_TOKENS))
    assert answer.right, answer
    assert answer.tokens == truth[truth.short[4]][:NEXT_TOKENS]
    assert (answer.params or {}).get("failure") is None
    scene.nothing_is_left()
    for server, start in zip(pair.servers, seen, strict=True):
        said = server.log.read_text(errors="replace")[start:]
        assert NOISE.search(said) is None, f"{server.name}: {said[-6000:]}"


# -- requests that do not fit together ---------------------------------------------------------------------------------

LENGTH, CONTENT = (0, 1), (1, 3)
"""Short prompts of different lengths, and different ones of the same length."""
CAUSES = [(LENGTH, "tokens is 37 ids"), (CONTENT, "the two sides were given different requests: tokens is")]


@pytest.mark.parametrize(("which", "detail"), CAUSES)
def test_another_prompt_in_turn(scene: Scene, which: tuple[int, int], detail: str) -> None:
    theirs, ours = (scene.truth.short[number] for number in which)
    params = run(scene.prefilled(theirs))
    answer = run(scene.decoded(ours, params))
    scene.failed(answer, ours, detail, params["bootstrap_room"])


@pytest.mark.parametrize(("which", "detail"), CAUSES)
def test_another_prompt_at_once(scene: Scene, which: tuple[int, int], detail: str) -> None:
    theirs, ours = (scene.truth.short[number] for number in which)

    async def both() -> tuple[Answer, Answer]:
        return await asyncio.gather(scene.pushed(theirs, params), scene.decoded(ours, params))

    params = scene.room()
    first, answer = run(both())
    assert first.right, first
    scene.failed(answer, ours, detail, params["bootstrap_room"])


@pytest.mark.parametrize("way", ["in turn", "at once"])
def test_another_salt(scene: Scene, way: str) -> None:
    """A prompt that was computed for one tenant is not handed over to another."""
    prompt = scene.truth.short[0]
    other = {"salt": "another tenant"}

    async def ask() -> tuple[dict[str, Any], Answer]:
        if way == "in turn":
            params = await scene.prefilled(prompt)
            return params, await scene.decoded(prompt, {**params, **other})
        params = scene.room()
        _, answer = await asyncio.gather(scene.pushed(prompt, params), scene.decoded(prompt, {**params, **other}))
        return params, answer

    params, answer = run(ask())
    detail = "the two sides were given different requests: cache_salt is"
    scene.failed(answer, prompt, detail, params["bootstrap_room"])


@pytest.mark.sampled("policy", least=3)
@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        ({"bootstrap_room": -3}, "bootstrap_room is -3"),
        ({"bootstrap_room": 2**63}, "bootstrap_room is 9223372036854775808"),
        ({"bootstrap_room": "7"}, "bootstrap_room is '7'"),
        ({"bootstrap_room": None}, "has no bootstrap_room"),
        ({"bootstrap_host": ["127.0.0.1"]}, "bootstrap_host is ['127.0.0.1']"),
        ({"bootstrap_port": 65536}, "bootstrap_port is 65536"),
        ({"do_remote_decode": True}, "set one of them"),
        ({"do_remote_decode": True, "do_remote_prefill": None}, "send the request to the other engine"),
    ],
)
def test_parameters_that_make_no_sense(scene: Scene, wrong: dict[str, Any], detail: str) -> None:
    prompt = scene.truth.short[0]
    answer = run(scene.decoded(prompt, {**scene.room(), **wrong}))
    scene.failed(answer, prompt, detail, None)


@pytest.mark.parametrize(
    ("wrong", "detail"),
    [
        ({"bootstrap_room": 0.5, "do_remote_decode": True}, "bootstrap_room is 0.5"),
        ({"do_remote_prefill": True}, "send the request to the other engine"),
    ],
)
def test_the_prefill_side_loads_nothing_so_it_answers_with_the_error(
    scene: Scene, wrong: dict[str, Any], detail: str
) -> None:
    prompt, params = scene.truth.short[0], {**scene.room(), **wrong}
    answer = run(scene.plain(scene.prefill, prompt, params=params))
    scene.right(answer, prompt)
    assert detail in (answer.params or {})["failure"]


def test_a_room_that_no_prefill_request_opens(scene: Scene) -> None:
    prompt, params = scene.truth.short[0], scene.room()
    scene.failed(run(scene.decoded(prompt, params)), prompt, "got no request for this room", params["bootstrap_room"])


def test_a_directory_that_is_not_there(scene: Scene) -> None:
    prompt, params = scene.truth.short[0], {**scene.room(), "bootstrap_port": free_port(LOOPBACK)}
    scene.failed(run(scene.decoded(prompt, params)), prompt, "connection refused; is it up?", params["bootstrap_room"])


def test_one_room_for_two_decode_requests(scene: Scene) -> None:
    prompt, other, params = scene.truth.long[0], scene.truth.short[0], scene.room()

    async def twice() -> tuple[Answer, Answer]:
        async with scene.in_the_middle(prompt, params) as (_, first):
            return await scene.decoded(other, params), await first

    second, first = run(twice())
    scene.failed(second, other, "is already open on the decode side", params["bootstrap_room"])
    scene.right(first, prompt)
    assert first.params is None or "failure" not in first.params


def test_one_room_for_two_prefill_requests(scene: Scene) -> None:
    prompt, other, params = scene.truth.long[0], scene.truth.short[0], scene.room()

    async def twice() -> tuple[Answer, Answer]:
        async with scene.in_the_middle(prompt, params) as (_, decoding):
            return await scene.pushed(other, params), await decoding

    second, answer = run(twice())
    assert second.right, second  # its own answer is right, but no decode side gets its blocks
    scene.right(answer, prompt)
    assert answer.params is None or "failure" not in answer.params


# -- clients that leave ------------------------------------------------------------------------------------------------


def test_the_decode_client_leaves_before_the_prefill_request_comes(scene: Scene) -> None:
    prompt, params = scene.truth.short[0], scene.room()

    async def leave() -> Answer:
        async with Tasks() as tasks:
            tasks.start(scene.decoded(prompt, params))
            await scene.until_phase(scene.decode, params, "OFFERED")
        return await scene.pushed(prompt, params)

    assert run(leave()).right
    scene.gave_up(scene.prefill, params, "the decode engine ended the request: aborted")


def test_the_decode_client_leaves_in_the_middle(scene: Scene) -> None:
    prompt, params = scene.truth.long[1], scene.room()

    async def leave() -> Answer:
        async with scene.in_the_middle(prompt, params) as (prefilling, decoding):
            decoding.cancel()
            return await prefilling

    assert run(leave()).right
    scene.gave_up(scene.prefill, params, "the decode engine ended the request: aborted")


def test_the_prefill_client_leaves_in_the_middle(scene: Scene) -> None:
    prompt, params = scene.truth.long[1], scene.room()

    async def leave() -> Answer:
        async with scene.in_the_middle(prompt, params) as (prefilling, decoding):
            prefilling.cancel()
            return await decoding

    detail = "the prefill engine ended the request before its KV cache was complete"
    scene.failed(run(leave()), prompt, detail, params["bootstrap_room"])


def test_the_prefill_client_leaves_in_turn(scene: Scene) -> None:
    async def leave() -> None:
        async with Tasks() as tasks:
            tasks.start(scene.prefilled(scene.truth.long[1]))
            await until(lambda: scene.prefill.kv_usage() > 0, lambda: "the prefill has not begun")

    run(leave())


def test_the_decode_client_leaves_while_it_decodes(scene: Scene) -> None:
    async def leave() -> None:
        async with Tasks() as tasks:
            tasks.start(scene.in_turn(scene.truth.short[0], max_tokens=AGES))
            await until(lambda: decoding(scene.decode) == 1, lambda: "it does not decode")
            await asyncio.to_thread(scene.nothing_is_left, scene.prefill)

    run(leave())


def decoding(server: Server) -> float:
    return server.metric("vllm:num_requests_running")


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_finished_prompt_that_no_decode_side_takes(scene: Scene) -> None:
    prompt = scene.truth.short[0]
    params = run(scene.prefilled(prompt))
    assert scene.prefill.kv_usage() > 0
    scene.nothing_is_left(scene.prefill)
    room = params["bootstrap_room"]
    assert scene.prefill.running.lines(
        f"room {room} failed", "timed out after 6 s (bootstrap_s) waiting for a decode worker"
    )
    scene.failed(run(scene.decoded(prompt, params)), prompt, "got no request for this room", room)


def test_a_queue_that_is_longer_than_the_lease(scene: Scene) -> None:
    """Both sequences of the decode side are in use. One request waits in its queue, and another one leaves it."""
    short = scene.truth.short

    async def queue() -> tuple[dict[str, Any], Answer]:
        async with Tasks() as tasks:
            taken = [tasks.start(scene.plain(scene.decode, short[n], max_tokens=AGES)) for n in (0, 1)]
            await until(lambda: decoding(scene.decode) == 2, lambda: "the decode side does not fill")
            stays, leaves = await scene.prefilled(short[2]), await scene.prefilled(short[3])
            staying, leaving = (tasks.start(scene.decoded(*leg)) for leg in ((short[2], stays), (short[3], leaves)))
            for params in (stays, leaves):
                await scene.until_phase(scene.decode, params, "OPENED")
            held = scene.prefill.kv_usage()
            await asyncio.to_thread(still, lambda: scene.prefill.kv_usage() == held, 2 * LEASE_S)
            leaving.cancel()
            await until(lambda: 0 < scene.prefill.kv_usage() < held, lambda: f"{scene.prefill.kv_usage()} of {held}")
            scene.gave_up(scene.prefill, leaves, "the decode engine ended the request before it had blocks: aborted")
            for one in taken:
                one.cancel()
            return stays, await staying

    params, answer = run(queue())
    assert answer.right, answer
    assert answer.tokens == scene.truth[short[2]]
    assert answer.params is None, (params, answer)


def still(true: Callable[[], bool], for_s: float) -> None:
    """Poll for this time, and check that the condition is true each time."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert true()
        time.sleep(0.1)


# -- what the decode side's engine does by itself ----------------------------------------------------------------------


def test_a_decode_side_that_must_compute_the_prompt_releases_the_blocks(scene: Scene) -> None:
    """If a request wants the log probabilities of the prompt, vLLM computes the prompt and loads nothing."""
    prompt = scene.truth.short[0]
    params = run(scene.prefilled(prompt))
    answer = run(scene.decoded(prompt, params, prompt_logprobs=1))
    scene.right(answer, prompt)
    assert answer.params is None, answer
    scene.gave_up(scene.prefill, params, "the decode engine computes this prompt by itself")


def test_a_decode_side_that_preempts(scene: Scene) -> None:
    """With both prompts loaded, one answer needs another block, so the other request is preempted and recomputed."""
    prompt, counted = scene.truth.long[CROSSING], "vllm:num_preemptions_total"
    before = scene.decode.metric(counted)

    async def two() -> list[Answer]:
        async with Tasks() as tasks:
            rooms = scene.room(), scene.room()
            answers = [tasks.start(scene.decoded(prompt, params)) for params in rooms]
            for params in rooms:
                await scene.until_phase(scene.decode, params, "OFFERED")
            await asyncio.gather(*(scene.pushed(prompt, params) for params in rooms))
            return [await answer for answer in answers]

    for answer in run(two()):
        scene.right(answer, prompt)
        assert answer.params is None, answer
    assert scene.decode.metric(counted) > before


# -- servers that stop -------------------------------------------------------------------------------------------------


def the_decode_side_is_stopped(scene: Scene) -> None:
    """The decode side has offered its blocks. The prefill request comes after the link was lost."""
    prompt, params = scene.truth.short[2], scene.room()

    async def stop() -> tuple[Answer, Answer]:
        async with Tasks() as tasks:
            decoding = tasks.start(scene.decoded(prompt, params))
            await scene.until_phase(scene.decode, params, "OFFERED")
            peers = len(scene.prefill.rooms()["peers"])
            with stopped(scene.decode):
                await until(lambda: len(scene.prefill.rooms()["peers"]) < peers, lambda: "not noticed")
                first = await scene.pushed(prompt, params)
                await asyncio.to_thread(scene.nothing_is_left, scene.prefill)
            return first, await decoding

    first, answer = run(stop())
    assert first.right, first
    scene.failed(answer, prompt, "was lost", params["bootstrap_room"])


def the_prefill_side_is_stopped(scene: Scene) -> None:
    prompt, params = scene.truth.long[2], scene.room()
    room = params["bootstrap_room"]

    async def stop() -> tuple[Answer, Answer]:
        async with scene.in_the_middle(prompt, params) as (prefilling, decoding):
            with stopped(scene.prefill):
                told = scene.decode.running.lines
                await until(lambda: bool(told("cannot be loaded", f"room {room}", "was lost")), lambda: "not noticed")
                if scene.policy == "fail":
                    await decoding  # the client gets its answer even if the stopped side may still write
                    await until(lambda: (scene.decode.kv_usage() == 0) == drained_without_peer(scene), lambda: "blocks")
            return await prefilling, await decoding

    first, answer = run(stop())
    assert first.right, first
    scene.failed(answer, prompt, "was lost", room)


def drained_without_peer(scene: Scene) -> bool:
    """Return True if the decode side can prove the drain alone. Over tcp it can, because it does the writing itself."""
    return bool(scene.decode.extra["transport"] == "tcp")


@pytest.mark.parametrize(
    "story", [the_decode_side_is_stopped, the_prefill_side_is_stopped], ids=lambda story: story.__name__
)
def test_a_side_is_stopped_for_longer_than_its_peer_waits(scene: Scene, story: Callable[[Scene], None]) -> None:
    story(scene)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    server.running.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.running.signal(signal.SIGCONT)


# -- servers that are killed -------------------------------------------------------------------------------------------


def the_decode_side_is_killed(scene: Scene) -> None:
    """It is killed while it decodes a request, has another one in its queue, and receives the prompt of a third."""
    short, long = scene.truth.short, scene.truth.long
    params = scene.room()

    async def kill() -> tuple[Answer, ...]:
        async with Tasks() as tasks:
            first = tasks.start(scene.in_turn(short[0], max_tokens=AGES))
            await until(lambda: decoding(scene.decode) == 1, lambda: "it does not decode")
            async with scene.in_the_middle(long[3], params) as (prefilling, third):
                other = tasks.start(scene.plain(scene.decode, short[1], max_tokens=AGES))
                await until(lambda: decoding(scene.decode) == 2, lambda: "the decode side does not fill")
                waits = scene.room()
                second = tasks.start(scene.decoded(short[2], waits))
                await scene.until_phase(scene.decode, waits, "OPENED")
                scene.decode.kill()
                assert (await prefilling).right
                return await asyncio.gather(first, other, second, third)

    for answer in run(kill()):
        assert "connection" in answer.detail, answer
    scene.nothing_is_left(scene.prefill)
    scene.right(run(scene.plain(scene.prefill, short[5])), short[5])
    scene.pair.heal()


def the_prefill_side_is_killed(scene: Scene) -> None:
    """It is killed while it computes a prompt and keeps another one, which was not taken. A third is being decoded."""
    short, long = scene.truth.short, scene.truth.long
    params = scene.room()

    async def kill() -> tuple[Answer, Answer, Answer, Answer]:
        async with Tasks() as tasks:
            loaded = tasks.start(scene.in_turn(short[0], max_tokens=6 * NEW_TOKENS))
            await until(lambda: decoding(scene.decode) == 1, lambda: "it does not decode")
            async with scene.in_the_middle(long[3], params) as (prefilling, third):
                scene.prefill.kill()
                late = await scene.decoded(short[1], kept)
                return await prefilling, await loaded, late, await third

    kept = run(scene.prefilled(short[1]))
    prefilling, loaded, late, third = run(kill())
    assert "connection" in prefilling.detail, prefilling
    scene.right(loaded, short[0])
    scene.failed(late, short[1], "connection refused; is it up?", kept["bootstrap_room"])
    scene.failed(third, long[3], "was lost", params["bootstrap_room"])
    scene.nothing_is_left(scene.decode)
    scene.right(run(scene.plain(scene.decode, short[5])), short[5])
    scene.pair.heal()


@pytest.mark.parametrize(
    ("policy", "story"),
    [
        ("fail", the_decode_side_is_killed),  # the prefill side has no policy, so "recompute" would be the same
        ("fail", the_prefill_side_is_killed),
        ("recompute", the_prefill_side_is_killed),
    ],
    indirect=["policy"],
    ids=lambda given: getattr(given, "__name__", given),
)
def test_a_side_is_killed(scene: Scene, story: Callable[[Scene], None]) -> None:
    story(scene)

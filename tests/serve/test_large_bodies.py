"""Large prompts are refused by their length before they are tokenised, and tokenised outside of the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.pair import Pair
from engine.tiny import EOS, byte_tokenizer, tiny
from kvroom.core.trace import RequestTrace
from kvroom.engine.request import Request
from kvroom.serve.app import ModelCard
from kvroom.serve.decode import DecodeServer
from kvroom.serve.prefill import PrefillServer
from kvroom.serve.probe import Ask, Probe
from kvroom.serve.prompts import Prompts
from kvroom.serve.schema import Call, RoomEnd, parse
from kvroom.status.admin import Admission
from kvroom.status.answers import BadRequest

from .helpers import TEMPLATE

ROUTED = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
TOKENS = 64
ADMIN_URL = "http://127.0.0.1:9"
LONGEST = len("<eos>")
ROLES = {"prefill": PrefillServer, "decode": DecodeServer}


class NeverCalled:
    """A tokenizer for prompts that have to be refused before they are encoded."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.chat_template = TEMPLATE

    def __getattr__(self, name: str) -> Any:
        assert name != "encode", "a prompt was tokenised before its length was looked at"
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": " " * (TOKENS * LONGEST + 1)}),
        ("completions", {"prompt": ["x" * 4_000_000]}),
        ("generate", {"text": "\u00e9" * (TOKENS * LONGEST + 1)}),
        ("generate", {"text": "hello " * 100_000, "sampling_params": {"n": 128}}),
    ],
)
def test_a_text_that_no_tokens_can_hold_is_not_tokenised(route: Any, fields: dict[str, Any]) -> None:
    call = parse(route, {**ROUTED, "model": "m", **fields} if route != "generate" else {**ROUTED, **fields})
    refusal = f"characters, but .* {TOKENS} tokens, which are {TOKENS * LONGEST} characters at"
    with pytest.raises(BadRequest, match=refusal):
        Prompts(NeverCalled(), TOKENS, {EOS}).requests(call, RequestTrace("r"))


def test_a_text_that_tokens_can_hold_is_counted_in_tokens() -> None:
    text = "<eos>" * TOKENS
    call = parse("completions", {**ROUTED, "model": "m", "prompt": text})
    (request,) = Prompts(byte_tokenizer(), TOKENS, {EOS}).requests(call, RequestTrace("r"))
    assert request.prompt_ids == (EOS,) * TOKENS


def no_partner() -> AbstractAsyncContextManager[Ask]:
    raise AssertionError("no test here asks for the health of the engine")


class Paused:
    """Prompts whose tokeniser blocks until the test releases it."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def requests(self, call: Call, trace: RequestTrace) -> list[Request]:
        self.began.set()
        assert self.go_on.wait(20)
        raise BadRequest("too much was asked", "prompt")


@pytest.mark.parametrize("role", list(ROLES))
def test_a_worker_answers_others_while_it_tokenises(role: str) -> None:
    paused = Paused()

    async def ask(pair: Pair) -> tuple[int, int]:
        engine = pair.prefill if role == "prefill" else pair.decode
        worker = ROLES[role](engine, ModelCard("m", "m", TOKENS, 4), Probe(engine, no_partner))
        worker._prompts = paused
        async with (
            TestClient(TestServer(worker.application(ADMIN_URL))) as client,
            TestClient(TestServer(worker.admin_application(Admission()))) as operator,
        ):
            body = json.dumps({**ROUTED, "model": "m", "prompt": "x" * 100_000})
            large = asyncio.ensure_future(client.post("/v1/completions", data=body))
            assert await asyncio.to_thread(paused.began.wait, 20)
            others = [
                await client.get("/health"),
                *[await operator.get(path) for path in ("/metrics", "/rooms?oldest=1")],
            ]
            paused.go_on.set()
            return max(other.status for other in others), (await large).status

    with Pair(tiny().loaded) as pair:
        assert asyncio.run(ask(pair)) == (200, 400)


@pytest.mark.parametrize("role", list(ROLES))
def test_the_other_side_hears_of_a_client_that_left_while_its_prompt_was_tokenised(role: str) -> None:
    paused = Paused()

    async def leave(pair: Pair) -> list[tuple[int, str]]:
        engine = pair.prefill if role == "prefill" else pair.decode
        told: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        worker = ROLES[role](engine, ModelCard("m", "m", TOKENS, 4), Probe(engine, no_partner))
        worker._prompts = paused

        def hear(legs: Sequence[RoomEnd], detail: str) -> None:
            for leg in legs:
                told.put_nowait((leg.room, detail))

        worker.refused = hear
        async with TestClient(TestServer(worker.application(ADMIN_URL))) as client:
            prompts = ["x" * 50_000, "y" * 50_000]
            body = json.dumps({**ROUTED, "model": "m", "prompt": prompts, "bootstrap_room": [7, 9]})
            call = asyncio.ensure_future(client.post("/v1/completions", data=body))
            assert await asyncio.to_thread(paused.began.wait, 20)
            call.cancel()
            heard = [await asyncio.wait_for(told.get(), 20) for _ in range(2)]
            paused.go_on.set()
            return heard

    with Pair(tiny().loaded) as pair:
        why = f"cancelled: the client of the {role} worker left"
        assert asyncio.run(leave(pair)) == [(7, why), (9, why)]

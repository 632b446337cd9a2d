"""Clients of vLLM servers, which send one request, both legs in turn, or both legs at the same time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

Result = TypeVar("Result")
NEW_TOKENS = 24
DEADLINE_S = 120
REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass
class Answer:
    """The answer to one client. Times are seconds since its request."""

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    prompt_tokens: int = 0
    params: dict[str, Any] | None = None
    detail: str = ""
    """The error as the client received it, or ""."""
    prefill_s: float = 0.0
    """With both legs in turn: the duration of the first."""
    first_s: float = 0.0
    """The time of the first token."""
    took_s: float = 0.0

    @property
    def right(self) -> bool:
        """True if the answer ended regularly, whatever its tokens are."""
        return self.status == 200 and not self.detail and self.finish in ("stop", "length")


async def complete(
    url: str, prompt: Sequence[int] | str, *, max_tokens: int = NEW_TOKENS, stream: bool = False,
    params: Mapping[str, Any] | None = None, salt: str = "", request_id: str = "", deadline_s: float = DEADLINE_S,
    **body: Any,
) -> Answer:  # fmt: skip
    """Send POST /v1/completions, greedy and beyond the end-of-text token. Errors of server or network do not raise.

    `params` become `kv_transfer_params`. Prompts with different `salt` share no prefix in the servers' caches. `body`
    is added to the request unchanged.
    """
    asked = {
        "model": "model", "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": max_tokens,
        "temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": stream, **body,
    }  # fmt: skip
    if stream:
        asked["stream_options"] = {"include_usage": True}
    if salt:
        asked["cache_salt"] = salt
    if params is not None:
        asked["kv_transfer_params"] = dict(params)
    answer, started = Answer(), time.monotonic()
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    headers = {"X-Request-Id": request_id} if request_id else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{url}/v1/completions", json=asked, headers=headers) as response,
        ):
            answer.status = response.status
            if response.status != 200:
                answer.detail = await response.text()
            elif stream:
                await _read_stream(response, answer, started)
            else:
                _take(answer, await response.json())
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
        answer.detail = f"connection: {error!r}"
    answer.took_s = time.monotonic() - started
    answer.first_s = answer.first_s or answer.took_s
    return answer


async def in_turn(
    prefill: str, decode: str, prompt: Sequence[int], *, params: Mapping[str, Any] | None = None, salt: str = "",
    **options: Any,
) -> Answer:  # fmt: skip
    """Prefill, then decode with the parameters of the prefill reply, as vllm-router does. Times cover both legs.

    `params` replace parameters of the reply. If the prefill side fails, its answer is returned.
    """
    started = time.monotonic()
    first = await complete(prefill, prompt, max_tokens=1, params=REMOTE_DECODE, salt=salt)
    if not first.right:
        return first
    prefill_s = time.monotonic() - started
    answer = await complete(decode, prompt, params={**(first.params or {}), **(params or {})}, salt=salt, **options)
    answer.prefill_s = prefill_s
    answer.first_s += prefill_s
    answer.took_s += prefill_s
    return answer


async def both_at_once(
    prefill: str, decode: str, prompt: Sequence[int], room: Mapping[str, Any], *,
    decode_after_s: float = 0, prefill_after_s: float = 0, salt: str = "", **options: Any,
) -> tuple[Answer, Answer]:  # fmt: skip
    """Send both legs, each after its delay. Return the answers of the prefill side and of the decode side.

    `room` has `bootstrap_host`, `bootstrap_port` and `bootstrap_room`, which both sides get.
    """

    async def after(delay_s: float, url: str, **given: Any) -> Answer:
        await asyncio.sleep(delay_s)
        return await complete(url, prompt, params=room, salt=salt, **given)

    return await asyncio.gather(after(prefill_after_s, prefill, max_tokens=1), after(decode_after_s, decode, **options))


def run(request: Awaitable[Result]) -> Result:
    """Run a request from code that is not async, and return its result."""

    async def wait() -> Result:
        return await request

    return asyncio.run(wait())


def run_all(requests: Sequence[Callable[[], Awaitable[Result]]], at_once: int) -> list[Result]:
    """Make all requests, at most `at_once` at a time. Return their results in order."""

    async def all_of_them() -> list[Result]:
        slots = asyncio.Semaphore(at_once)

        async def one(make: Callable[[], Awaitable[Result]]) -> Result:
            async with slots:
                return await make()

        return list(await asyncio.gather(*(one(make) for make in requests)))

    return asyncio.run(all_of_them())


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, started: float) -> None:
    done = False
    async for line in response.content:
        data = line.strip()
        if not data.startswith(b"data: "):
            continue
        if data == b"data: [DONE]":
            done = True
            break
        event = json.loads(data.removeprefix(b"data: "))
        if "error" in event:
            answer.detail = json.dumps(event["error"])
            return
        answer.first_s = answer.first_s or time.monotonic() - started
        _take(answer, event)
    if not done:
        answer.detail = "the stream was closed before its end"


def _take(answer: Answer, event: Mapping[str, Any]) -> None:
    """Add a reply, or one event of a stream, to the answer."""
    for choice in event.get("choices") or ():
        answer.tokens += choice.get("token_ids") or []
        answer.text += choice.get("text") or ""
        answer.finish = choice.get("finish_reason") or answer.finish
    usage = event.get("usage") or {}
    answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
    answer.params = event.get("kv_transfer_params") or answer.params

"""Clients of SGLang servers, which send one request, or both legs of one."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from servers import Server

Prompt = tuple[int, ...]
NEW_TOKENS = 16
DEADLINE_S = 180
_ROOMS = itertools.count(int.from_bytes(os.urandom(3), "big") << 20 | 1)


@dataclass
class Answer:
    """The answer to one client. Times are seconds since its request."""

    status: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    detail: str = ""
    """The error as the client received it, or ""."""
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    """The best candidates for each token as (log probability, token), best first, if the request wanted them."""
    first_s: float = 0.0
    took_s: float = 0.0

    @property
    def right(self) -> bool:
        """True if the answer ended regularly, whatever its tokens are."""
        return self.status == 200 and not self.detail and self.finish in ("stop", "length")


def new_room(prefill: Server) -> dict[str, Any]:
    """Return the parameters of a new room at this server's directory."""
    return {"bootstrap_host": prefill.host, "bootstrap_port": prefill.bootstrap_port, "bootstrap_room": next(_ROOMS)}


async def generate(
    url: str, prompt: Sequence[int] | str, *, max_tokens: int = NEW_TOKENS, stream: bool = False,
    room: Mapping[str, Any] | None = None, salt: str = "", top: int = 0, deadline_s: float = DEADLINE_S, **body: Any,
) -> Answer:  # fmt: skip
    """Send POST /generate, greedy and beyond the end-of-text token. Errors of server or network do not raise.

    Prompts with different `salt` share no prefix in the servers' caches. `top` is the number of candidates to return
    for each token. `body` is added to the request unchanged.
    """
    asked: dict[str, Any] = {
        "text" if isinstance(prompt, str) else "input_ids": prompt if isinstance(prompt, str) else list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        "stream": stream, **(room or {}), **body,
    }  # fmt: skip
    if salt:
        asked["extra_key"] = salt
    if top:
        asked |= {"return_logprob": True, "top_logprobs_num": top}
    return await post(f"{url}/generate", asked, deadline_s=deadline_s)


async def chat(url: str, question: str, *, max_tokens: int = NEW_TOKENS, stream: bool = False, **body: Any) -> Answer:
    """Send POST /v1/chat/completions for the model `model`, greedy. The answer has the text, but no token ids."""
    asked = {
        "model": "model", "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
        "temperature": 0, "ignore_eos": True, "stream": stream, **body,
    }  # fmt: skip
    return await post(f"{url}/v1/chat/completions", asked)


async def post(url: str, body: Mapping[str, Any], *, deadline_s: float = DEADLINE_S) -> Answer:
    """Send a request of either kind and read its whole answer."""
    answer, started = Answer(), time.monotonic()
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.detail = await response.text()
            elif body["stream"]:
                await _read_stream(response, answer, started)
            else:
                _take(answer, await response.json())
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
        answer.detail = f"connection: {error!r}"
    answer.took_s = time.monotonic() - started
    answer.first_s = answer.first_s or answer.took_s
    return answer


async def send(url: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Send a request. Return the status and the reply, unchanged."""
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, json=body) as response:
        return response.status, await response.json()


def read(reply: Mapping[str, Any]) -> Answer:
    """Return the answer that is in one of several replies to a request."""
    answer = Answer(status=200)
    _take(answer, reply)
    return answer


async def both(
    prefill: Server, decode: Server, prompt: Sequence[int] | str, *, room: Mapping[str, Any] | None = None,
    decode_after_s: float = 0, prefill_after_s: float = 0, salt: str = "", **options: Any,
) -> tuple[Answer, Answer]:  # fmt: skip
    """Send both legs as a router does, each after its delay. Return the answers of prefill side and decode side."""
    room = new_room(prefill) if room is None else room

    async def after(delay_s: float, url: str, **given: Any) -> Answer:
        await asyncio.sleep(delay_s)
        return await generate(url, prompt, room=room, salt=salt, **given)

    options.setdefault("max_tokens", NEW_TOKENS)
    return await asyncio.gather(
        after(prefill_after_s, prefill.url, **{**options, "stream": False, "top": 0}),
        after(decode_after_s, decode.url, **options),
    )


async def abort(server: Server, rid: str = "", everything: bool = False) -> int:
    """Send POST /abort_request for a request's `rid`, or for all requests. Return the status."""
    body = {"rid": rid, "abort_all": everything}
    async with aiohttp.ClientSession() as session, session.post(f"{server.url}/abort_request", json=body) as response:
        return response.status


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, started: float) -> None:
    async for line in response.content:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                answer.detail = json.dumps(event["error"])
                return
            answer.first_s = answer.first_s or time.monotonic() - started
            _take(answer, event)
    answer.detail = "the stream was closed before its end"


def _take(answer: Answer, event: Mapping[str, Any]) -> None:
    """Read a reply or one event of a stream. Each event has all tokens so far, or, of a chat, the next text."""
    for choice in event.get("choices") or ():
        message = choice.get("message") or choice.get("delta") or {}
        answer.text += message.get("content") or ""
        answer.finish = choice.get("finish_reason") or answer.finish
        answer.prompt_tokens = (event.get("usage") or {}).get("prompt_tokens", answer.prompt_tokens)
    if "meta_info" not in event:
        return
    about = event["meta_info"]
    ending = about["finish_reason"]
    if "prompt_tokens" in about:  # absent, like all counts, if a request is aborted before SGLang computes it
        answer.tokens, answer.text = event["output_ids"], event["text"]
        answer.prompt_tokens, answer.cached_tokens = about["prompt_tokens"], about["cached_tokens"]
    answer.finish = ending["type"] if ending else ""
    if answer.finish == "abort":
        answer.detail = ending["message"]
    answer.top = [[(logprob, token) for logprob, token, _ in best] for best in about.get("output_top_logprobs") or ()]

"""`kvroom demo`: three answers, a client that leaves, a worker that is killed, and one more answer.

The exit status is 0 only if every token equals the one that `transformers.generate` gives in a single process, the
decode worker computed no prompt token, neither failure left anything on a worker, and at the end no room is left open.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.table import Table

from kvroom.errors import KVRoomError
from kvroom.http import describe_http_error, http_session, request
from kvroom.network import load_admin_token

from .admin import AdminAddress, AdminClient
from .cluster import WORKER_START_S, cluster, wait_for_router
from .console import OutputConsole
from .exit_status import ExitStatus
from .interrupts import run_until_interrupted
from .options import DemoOptions
from .processes import ChildEnded
from .progress import progress
from .scenes import CLEAN_WITHIN_S, Left, Stage, client_leaves, prefill_dies, say, table_of

IDLE_WITHIN_S = 20
ROUTER_FINDS_WITHIN_S = 60.0
_RETRY_S = 0.25
_STOPS = (
    "Alder Bridge", "Birch Market", "Cooper Street", "Dock Road", "Elm Gardens", "Foundry Lane", "Granary Square",
    "Harbour View", "Ivy Terrace", "Juniper Hill", "Kiln Corner", "Lantern Quay", "Mill Pond", "North Gate",
)  # fmt: skip
_LINES = 40
_BROKEN_LINES = 30
"""Lines of the prompts of broken requests: more than one chunk, so that one is handed over while the next computes."""


class Question(NamedTuple):
    """A question of the demo: `title` is displayed, and `content` is sent as the user's turn of a chat."""

    title: str
    content: str


@dataclass
class Streamed:
    """The answer of one stream, as received so far.

    `cost` is the worker's `kvroom` object (see docs/http-api.md) and `usage` holds the token counts.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, body: dict[str, Any]) -> str:
        """Add one event of the stream and return its text. Raises `KVRoomError` if the event reports an error."""
        if "error" in body:
            raise KVRoomError(f"the stream ended with an error: {body['error']}")
        self.usage = body.get("usage") or self.usage
        for cost in body.get("kvroom") or ():
            self.cost = cost
        fresh = ""
        for choice in body["choices"]:
            fresh += choice["delta"].get("content") or ""
            self.token_ids += choice.get("token_ids") or ()
        self.text += fresh
        return fresh


@dataclass
class Outcome:
    """One question with its answer. `equal` is True if a single process generates the same tokens."""

    question: Question
    answer: Streamed
    equal: bool = False


@dataclass
class Findings:
    """Everything that the demo has seen, for its tables and its verdict."""

    outcomes: list[Outcome] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    """The state of each worker after each failure."""
    open_at_end: dict[str, str] = field(default_factory=dict)
    """The answers of workers that report open rooms at the end, by worker name."""

    @property
    def good(self) -> bool:
        return passed(self.outcomes) and not self.open_at_end and all(one.is_clean for one in self.left)


def run_demo(options: DemoOptions) -> int:
    """Run the demo. Return DONE if all answers are equal and nothing is left, else FAILED, or INTERRUPTED."""
    console = OutputConsole()
    found = run_until_interrupted(_serve_and_ask(options, console))
    if found is None:
        return ExitStatus.INTERRUPTED
    outcomes = found.outcomes
    with progress("checking against transformers.generate in one process") as report:
        from kvroom.engine.weights import find  # imports torch

        reference = Reference(find(options.model, progress=report), dtype=options.dtype, device=options.device)
        for outcome in outcomes:
            report(outcome.question.title)
            prompt_ids = reference.chat_ids(outcome.question.content)
            expected = reference.greedy(prompt_ids, options.max_tokens)
            same_prompt = outcome.answer.usage["prompt_tokens"] == len(prompt_ids)
            outcome.equal = same_prompt and outcome.answer.token_ids == expected
    table = Table(title="cost of each request")
    table.add_column("request")
    for number in range(1, len(outcomes) + 1):
        table.add_column(str(number), justify="right")
    for name, show in _ROWS.items():
        table.add_row(name, *(show(outcome) for outcome in outcomes))
    console.print(table)
    if found.left:
        console.print(table_of(found.left))
    for one in found.left:
        if not one.is_clean:
            say(console, f"left on {one.worker} {CLEAN_WITHIN_S} s after the event ({one.event}): see the table")
    for name, left in found.open_at_end.items():
        say(console, f"left open on {name}: {left}")
    say(console, "every token equal, nothing left open" if found.good else "the demo FAILED: see above")
    return ExitStatus.DONE if found.good else ExitStatus.FAILED


def passed(outcomes: list[Outcome]) -> bool:
    """Return True if there are answers, all of them equal, and the decode worker computed no prompt token of any."""
    return bool(outcomes) and all(one.equal and one.answer.cost["prompt_tokens_computed"] == 0 for one in outcomes)


def long_prompt(town: str, lines: int) -> str:
    """Return a prompt with 28 tokens for each line. Those of two towns have only their first words in common."""
    timetable = "\n".join(
        f"Tram {number} leaves {_STOPS[number * 5 % len(_STOPS)]} at {6 + number // 6:02d}:{number * 10 % 60:02d} "
        f"and reaches {_STOPS[(number * 5 + 3) % len(_STOPS)]} {12 + number * 7 % 23} minutes later."
        for number in range(1, lines + 1)
    )
    ask = "Where does tram 1 leave, and when? Answer in one sentence."
    return f"Here is the timetable of {town}.\n{timetable}\n{ask}"


def questions() -> list[Question]:
    """Return the three questions of the demo. The last one has a long prompt, whose KV takes many pages."""
    return [
        Question("What is the capital of France?", "What is the capital of France?"),
        Question("Why is the sky blue?", "Why is the sky blue? Answer in two sentences."),
        Question(f"a tram timetable of {_LINES} lines, and a question about it", long_prompt("a small town", _LINES)),
    ]


async def _serve_and_ask(options: DemoOptions, console: OutputConsole) -> Findings:
    """Start the cluster, ask the questions and break requests. Return what was seen."""
    async with AsyncExitStack() as stack:
        with progress("starting a prefill worker, a decode worker and the router") as report:

            def show(name: str, line: str) -> None:
                if name != "router":
                    report(f"[{name}] {line}")

            running = cluster(options, prefills=1, decodes=1, port=0, output=show)
            here = await stack.enter_async_context(running)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
        session = await stack.enter_async_context(http_session(timeout))
        stage = Stage(here, session, AdminClient(session, load_admin_token(os.environ)))
        found = Findings()
        for question in questions():
            found.outcomes.append(await here.children.guard(_ask(stage, question, options.max_tokens, console)))
        if options.failures:
            await _break_two(stage, options.max_tokens, console, found)
        await here.children.guard(_look_for_open_rooms(stage, found))
        return found


async def _break_two(stage: Stage, max_tokens: int, console: OutputConsole, found: Findings) -> None:
    """Run both scenes, and ask one more question once the killed worker is back."""
    children, here = stage.here.children, stage.here
    say(console, "")
    leaving = _body(here.model, long_prompt("Leeds", _BROKEN_LINES), max_tokens)
    found.left += await children.guard(client_leaves(stage, leaving, console))
    say(console, "")
    killed_at, left = await prefill_dies(
        stage, _body(here.model, long_prompt("York", _BROKEN_LINES), max_tokens), console
    )
    found.left += left
    await children.guard(_wait_until_back(stage))
    say(console, f"  prefill-0 was started again and serves {time.monotonic() - killed_at:.1f} s after it was killed")
    again = Question("Name three rivers of Europe.", "Name three rivers of Europe.")
    found.outcomes.append(await children.guard(_ask(stage, again, max_tokens, console)))


async def _wait_until_back(stage: Stage) -> None:
    """Wait until every worker is ready, and a request of one token passes through the router.

    The router may still fail the first request after the restart, because it held connections to the dead process.
    """
    here = stage.here
    ready = [worker.child.ready for worker in here.workers.values()]
    _, late = await asyncio.wait(ready, timeout=WORKER_START_S)
    if late:
        raise ChildEnded(f"timed out after {WORKER_START_S:g} s: a worker that was started again is not ready")
    await wait_for_router(here.url, len(ready))
    deadline = time.monotonic() + ROUTER_FINDS_WITHIN_S
    body = {**_body(here.model, "Hello", 1), "stream": False}
    del body["stream_options"]
    while True:
        try:
            async with request(stage.session, "POST", here.url, "/v1/chat/completions", json=body) as response:
                answer = f"{response.status}: {(await response.text())[:200]}"
                if response.status == 200:
                    return
        except aiohttp.ClientError as error:
            answer = describe_http_error(error)
        if time.monotonic() > deadline:
            raise ChildEnded(
                f"timed out after {ROUTER_FINDS_WITHIN_S:g} s: the router does not use the worker that was started "
                f"again; its last answer was {answer}"
            )
        await asyncio.sleep(_RETRY_S)


async def _ask(stage: Stage, question: Question, max_tokens: int, console: OutputConsole) -> Outcome:
    """Send a question and show its answer while it comes."""
    outcome = Outcome(question, Streamed())
    console.print(f"\n> {question.title}", markup=False, highlight=False)
    here = stage.here
    async with aclosing(
        ask(stage.session, here.url, here.model, question.content, max_tokens=max_tokens, answer=outcome.answer)
    ) as text:
        async for piece in text:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return outcome


async def _look_for_open_rooms(stage: Stage, found: Findings) -> None:
    """Query every worker for open rooms, which have `IDLE_WITHIN_S` seconds to end."""
    for name, url in stage.here.admin_urls.items():
        address = AdminAddress(url, url, is_trusted=True)
        answer = await stage.client.get(address, "/rooms", {"idle_within_s": IDLE_WITHIN_S})
        if answer.status != 200:
            found.open_at_end[name] = answer.body.decode(errors="replace")


def _body(model: str, content: str, max_tokens: int) -> dict[str, Any]:
    """Return a request for a greedy, streamed answer to one user turn."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, content: str, *, max_tokens: int, answer: Streamed
) -> AsyncGenerator[str, None]:
    """Stream the greedy answer to one user turn: yield its text piece by piece, and fill `answer`.

    Raises `KVRoomError` with the server's response if it refuses the request or ends the stream early.
    """
    body = _body(model, content, max_tokens)
    async with request(session, "POST", url, "/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise KVRoomError(f"{url} answered {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not data or not line.startswith(b"data: "):
                continue
            if data == b"[DONE]":
                return
            yield answer.take(msgspec.json.decode(data))
    raise KVRoomError(f"{url} closed the stream before its end")


class Reference:
    """Greedy answers of plain `transformers.generate` in this process, without any code of kvroom's engine.

    `directory` holds a model in transformers' format. torch and transformers take seconds to import and only this class
    needs them, so it imports them itself, after the answers of the workers have been shown.
    """

    def __init__(self, directory: Path, *, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        ).to(device)

    def chat_ids(self, content: str) -> list[int]:
        """Return the prompt tokens of a chat with one user turn."""
        turns = [{"role": "user", "content": content}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Return the generated tokens, at most `max_tokens`, including the end-of-sequence token if it comes."""
        import torch

        prompt = torch.tensor([list(prompt_ids)], device=self._model.device)
        output = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_tokens
        )
        tokens: list[int] = output[0, len(prompt_ids) :].tolist()
        return tokens


_ROWS: dict[str, Callable[[Outcome], str]] = {
    "prompt tokens": lambda one: f"{one.answer.usage['prompt_tokens']:,}",
    "of these in decode's prefix cache": lambda one: f"{one.answer.cost['prefix_tokens']:,}",
    "pages": lambda one: f"{one.answer.cost['pages']:,}",
    "bytes": lambda one: f"{one.answer.cost['nbytes']:,}",
    "transport": lambda one: re.split("[:,]", str(one.answer.cost["transport"]))[0],
    "hand-off": lambda one: f"{one.answer.cost['handoff_s'] * 1e3:,.1f} ms",
    "time to first token": lambda one: f"{one.answer.cost['ttft_s'] * 1e3:,.1f} ms",
    "prompt tokens computed by decode": lambda one: str(one.answer.cost["prompt_tokens_computed"]),
    "answer tokens": lambda one: str(one.answer.usage["completion_tokens"]),
    "equal to transformers.generate": lambda one: "yes" if one.equal else "NO",
}

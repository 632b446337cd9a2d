"""`kvroom demo`: three answers streamed through prefill, decode and router, each token checked.

The exit status is 0 only if every token equals the one that `transformers.generate` gives in a single process, the
decode worker computed no prompt token, and every worker reports that no room is left open.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table

from kvroom.errors import KVRoomError
from kvroom.http import http_session, request
from kvroom.network import load_admin_token

from .admin import AdminAddress, AdminClient
from .cluster import Cluster, cluster
from .interrupts import run_until_interrupted
from .options import DemoOptions
from .progress import progress

IDLE_WITHIN_S = 20
INTERRUPTED_STATUS = 130
_STOPS = (
    "Alder Bridge", "Birch Market", "Cooper Street", "Dock Road", "Elm Gardens", "Foundry Lane", "Granary Square",
    "Harbour View", "Ivy Terrace", "Juniper Hill", "Kiln Corner", "Lantern Quay", "Mill Pond", "North Gate",
)  # fmt: skip
_LINES = 40


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


def run_demo(options: DemoOptions) -> int:
    """Run the demo. Return 0 if all answers are equal and no room is left open, 1 if not, 130 if interrupted."""
    console = Console()
    outcomes: list[Outcome] = []
    open_workers = run_until_interrupted(_serve_and_ask(options, console, outcomes))
    if open_workers is None:
        return INTERRUPTED_STATUS
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
    for name, left in open_workers.items():
        console.print(f"left open on {name}: {left}")
    good = passed(outcomes) and not open_workers
    console.print("every token equal, nothing left open" if good else "the demo FAILED: see above")
    return 0 if good else 1


def passed(outcomes: list[Outcome]) -> bool:
    """Return True if there are answers, all of them equal, and the decode worker computed no prompt token of any."""
    return bool(outcomes) and all(one.equal and one.answer.cost["prompt_tokens_computed"] == 0 for one in outcomes)


def questions() -> list[Question]:
    """Return the three questions of the demo. The last one has a long prompt, whose KV takes many pages."""
    timetable = "\n".join(
        f"Tram {number} leaves {_STOPS[number * 5 % len(_STOPS)]} at {6 + number // 6:02d}:{number * 10 % 60:02d} "
        f"and reaches {_STOPS[(number * 5 + 3) % len(_STOPS)]} {12 + number * 7 % 23} minutes later."
        for number in range(1, _LINES + 1)
    )
    ask = "Where does tram 1 leave, and when? Answer in one sentence."
    return [
        Question("What is the capital of France?", "What is the capital of France?"),
        Question("Why is the sky blue?", "Why is the sky blue? Answer in two sentences."),
        Question(
            f"a tram timetable of {_LINES} lines, and a question about it",
            f"Here is the timetable of a small town.\n{timetable}\n{ask}",
        ),
    ]


async def _serve_and_ask(options: DemoOptions, console: Console, outcomes: list[Outcome]) -> dict[str, str]:
    """Start the cluster and fill `outcomes`. Return the answers of workers that report open rooms, by worker name."""
    async with AsyncExitStack() as stack:
        with progress("starting a prefill worker, a decode worker and the router") as report:

            def show(name: str, line: str) -> None:
                if name != "router":
                    report(f"[{name}] {line}")

            running = cluster(options, prefills=1, decodes=1, port=0, output=show)
            here = await stack.enter_async_context(running)
        return await here.children.guard(_ask_all(here, options.max_tokens, console, outcomes))


async def _ask_all(here: Cluster, max_tokens: int, console: Console, outcomes: list[Outcome]) -> dict[str, str]:
    """Send every question, then query every worker for open rooms, which have `IDLE_WITHIN_S` seconds to end."""
    async with http_session(aiohttp.ClientTimeout(total=None, sock_read=300)) as session:
        for question in questions():
            outcome = Outcome(question, Streamed())
            console.print(f"\n> {question.title}", markup=False, highlight=False)
            async with aclosing(
                ask(session, here.url, here.model, question.content, max_tokens=max_tokens, answer=outcome.answer)
            ) as text:
                async for piece in text:
                    console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
            outcomes.append(outcome)
        client = AdminClient(session, load_admin_token(os.environ))
        left_open = {}
        for name, url in here.admin_urls.items():
            address = AdminAddress(url, url, is_trusted=True)
            answer = await client.get(address, "/rooms", {"idle_within_s": IDLE_WITHIN_S})
            if answer.status != 200:
                left_open[name] = answer.body.decode(errors="replace")
        return left_open


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, content: str, *, max_tokens: int, answer: Streamed
) -> AsyncGenerator[str, None]:
    """Stream the greedy answer to one user turn: yield its text piece by piece, and fill `answer`.

    Raises `KVRoomError` with the server's response if it refuses the request or ends the stream early.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
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

"""`kvroom demo`: three answers streamed through prefill, decode and router, each token checked.

Exit status 0 only if every token equals what one process alone generates, the decode worker computed no prompt token,
and every worker says that nothing is left open.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

import aiohttp
from rich.console import Console
from rich.table import Table

from kvroom.cli.admin import AdminClient, Window
from kvroom.cli.cluster import Cluster, cluster
from kvroom.cli.interrupts import run_until_interrupted
from kvroom.cli.progress import progress
from kvroom.cli.questions import Question, questions
from kvroom.cli.stream import Answer, ask
from kvroom.http import http_session
from kvroom.network import load_admin_token

IDLE_WITHIN_S = 20
INTERRUPTED_STATUS = 130


@dataclass
class Outcome:
    """One question with its answer, and whether one process alone answers the same."""

    question: Question
    answer: Answer
    equal: bool = False


def run_demo(options: argparse.Namespace) -> int:
    """0: all equal and nothing left open. 1: not. 130: interrupted."""
    console = Console()
    outcomes: list[Outcome] = []
    open_workers = run_until_interrupted(_serve_and_ask(options, console, outcomes))
    if open_workers is None:
        return INTERRUPTED_STATUS
    _compare(options, outcomes)
    console.print(_table(outcomes))
    for name, left in open_workers.items():
        console.print(f"left open on {name}: {left}")
    good = passed(outcomes) and not open_workers
    console.print("every token equal, nothing left open" if good else "the demo FAILED: see above")
    return 0 if good else 1


def passed(outcomes: list[Outcome]) -> bool:
    """Whether there are answers, all equal to one process's, and none of their prompts was computed by decode."""
    return bool(outcomes) and all(one.equal and one.answer.cost["prompt_tokens_computed"] == 0 for one in outcomes)


async def _serve_and_ask(options: argparse.Namespace, console: Console, outcomes: list[Outcome]) -> dict[str, str]:
    """Fill `outcomes`; returns what is left open, by worker."""
    async with AsyncExitStack() as stack:
        with progress("starting a prefill worker, a decode worker and the router") as report:

            def show(name: str, line: str) -> None:
                if name != "router":
                    report(f"[{name}] {line}")

            running = cluster(options, prefills=1, decodes=1, port=0, output=show)
            here = await stack.enter_async_context(running)
        return await here.children.guard(_ask_all(here, options.max_tokens, console, outcomes))


async def _ask_all(here: Cluster, max_tokens: int, console: Console, outcomes: list[Outcome]) -> dict[str, str]:
    async with http_session(aiohttp.ClientTimeout(total=None, sock_read=300)) as session:
        for question in questions():
            outcome = Outcome(question, Answer())
            console.print(f"\n> {question.title}", markup=False, highlight=False)
            async with aclosing(
                ask(session, here.url, here.model, question.content, max_tokens, outcome.answer)
            ) as text:
                async for piece in text:
                    console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
            outcomes.append(outcome)
        client = AdminClient(session, load_admin_token(os.environ))
        return {name: left for name, url in here.admin_urls.items() if (left := await _left_open(client, url))}


async def _left_open(client: AdminClient, url: str) -> str:
    """What a worker still holds after `IDLE_WITHIN_S`; empty if nothing."""
    answer = await client.ask(Window(url, url, is_trusted=True), "/rooms", {"idle_within_s": IDLE_WITHIN_S})
    return "" if answer.status == 200 else answer.body.decode(errors="replace")


def _compare(options: argparse.Namespace, outcomes: list[Outcome]) -> None:
    with progress("checking against transformers.generate in one process") as report:
        # torch and transformers take seconds to import, and the answers above need neither.
        from kvroom.cli.reference import Reference
        from kvroom.engine.weights import find

        reference = Reference(find(options.model, progress=report), dtype=options.dtype, device=options.device)
        for outcome in outcomes:
            report(outcome.question.title)
            prompt_ids = reference.chat_ids(outcome.question.content)
            expected = reference.greedy(prompt_ids, options.max_tokens)
            same_prompt = outcome.answer.usage["prompt_tokens"] == len(prompt_ids)
            outcome.equal = same_prompt and outcome.answer.token_ids == expected


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="what each request took")
    table.add_column("request")
    for number in range(1, len(outcomes) + 1):
        table.add_column(str(number), justify="right")
    for name, show in _ROWS.items():
        table.add_row(name, *(show(outcome) for outcome in outcomes))
    return table


_ROWS: dict[str, Callable[[Outcome], str]] = {
    "prompt tokens": lambda one: f"{one.answer.usage['prompt_tokens']:,}",
    "of these in the decode's cache": lambda one: f"{one.answer.cost['prefix_tokens']:,}",
    "pages": lambda one: f"{one.answer.cost['pages']:,}",
    "bytes": lambda one: f"{one.answer.cost['nbytes']:,}",
    "transport": lambda one: re.split("[:,]", str(one.answer.cost["transport"]))[0],
    "hand-off": lambda one: f"{one.answer.cost['handoff_s'] * 1e3:,.1f} ms",
    "time to first token": lambda one: f"{one.answer.cost['ttft_s'] * 1e3:,.1f} ms",
    "prompt tokens computed by decode": lambda one: str(one.answer.cost["prompt_tokens_computed"]),
    "answer tokens": lambda one: str(one.answer.usage["completion_tokens"]),
    "equal to transformers.generate": lambda one: "yes" if one.equal else "NO",
}

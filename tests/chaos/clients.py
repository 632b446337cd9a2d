"""Clients under chaos: each asks once and says what it got, and how long that took.

What a client may get is: the right tokens; or a clear error, with the right tokens, if any, before it. A token that
`transformers.generate` would not have given is wrong, whatever comes after it.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from e2e.test_real_model import Expected

from .fleet import Worker
from .wire import LOOPBACK

NEW_TOKENS = 12
LONG = 1030
SHORT = 100
Prompt = tuple[int, ...]
_ROOMS = itertools.count(1)


class Truth(Expected):
    """Prompts and what `transformers.generate` continues them with, greedily in float32, worked out once."""

    def shuffled(self, length: int, seed: int) -> Prompt:
        """`length` tokens of running text in random order: no two prompts have an answer or a beginning in common."""
        return tuple(random.Random(seed).choices(self._ids, k=length))

    def answer(self, prompt: Prompt) -> list[int]:
        if prompt not in self._answers:
            self._answers[prompt] = self.reference.greedy(prompt, NEW_TOKENS)
        return self._answers[prompt]


class Outcome(NamedTuple):
    """The result of one client. `detail` is the text of the error, empty if there was none."""

    status: int
    tokens: list[int]
    detail: str
    took_s: float

    def verdict(self, expected: Sequence[int]) -> str:
        """`right`, `error`, `wrong` or `unclear`."""
        if self.tokens != list(expected[: len(self.tokens)]):
            return "wrong"
        if self.detail:
            return "error"
        return "right" if self.status == 200 and len(self.tokens) == len(expected) else "unclear"


def ask(url: str, prompt: Prompt, *, stream: bool, deadline_s: float, **room: str | int) -> Outcome:
    """Ask the router and read to the end, whatever the end is."""
    started = time.monotonic()
    status, detail = 0, ""
    tokens: list[int] = []
    try:
        with _sent(url, prompt, stream=stream, deadline_s=deadline_s, room=room) as connection:
            response = connection.getresponse()
            status = response.status
            if status == 200 and stream:
                tokens, detail = _read_stream(response)
            elif status == 200:
                tokens = json.loads(response.read())["output_ids"]
            else:
                detail = _error_of(status, response.read().decode())
    except (OSError, http.client.HTTPException) as error:
        detail = f"connection: {error!r}"
    return Outcome(status, tokens, detail, time.monotonic() - started)


@contextmanager
def asking(url: str, prompt: Prompt, *, deadline_s: float) -> Iterator[http.client.HTTPConnection]:
    """A stream that was asked for, of which the caller reads as much as it likes; leaving the block hangs up."""
    with _sent(url, prompt, stream=True, deadline_s=deadline_s, room={}) as connection:
        yield connection


@contextmanager
def _sent(
    url: str, prompt: Prompt, *, stream: bool, deadline_s: float, room: Mapping[str, str | int]
) -> Iterator[http.client.HTTPConnection]:
    body = {
        **room,
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
        "stream": stream,
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=deadline_s)
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        yield connection
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse) -> tuple[list[int], str]:
    tokens: list[int] = []
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            return tokens, ""
        if data and line.startswith(b"data: "):
            event = json.loads(data)
            if "error" in event:
                return tokens, _error_of(response.status, data.decode())
            tokens = event["output_ids"]
    return tokens, "the stream was closed before its end"


def _error_of(status: int, text: str) -> str:
    """The error's own words; empty if there are none, which makes it unclear."""
    try:
        error = json.loads(text)["error"]
        words = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        words = text
    return f"{status}: {words}" if words else ""


def ask_directly(prefill: Worker, decode: Worker, prompt: Prompt, *, deadline_s: float) -> Outcome:
    """Ask one pair of workers in a room of its own, as a router would, and return what the decode worker said.

    What the prefill worker answers is not waited for: it may be stopped.
    """
    room: dict[str, str | int] = {
        "bootstrap_host": LOOPBACK,
        "bootstrap_port": prefill.bootstrap_port,
        "bootstrap_room": next(_ROOMS),
    }
    with _sent(prefill.url, prompt, stream=False, deadline_s=deadline_s, room=room):
        return ask(decode.url, prompt, stream=True, deadline_s=deadline_s, **room)


class Load:
    """Clients in threads, each with its own connection. `finish` returns what all of them got."""

    def __init__(self, truth: Truth, url: str, deadline_s: float) -> None:
        self._truth = truth
        self._url = url
        self._deadline_s = deadline_s
        self._pool = ThreadPoolExecutor(128, thread_name_prefix="client")
        self._asked: list[tuple[Prompt, Future[Outcome]]] = []

    def ask(self, prompts: Sequence[Prompt]) -> None:
        """Send all of them to the router now; every second one streams."""
        for prompt in prompts:
            stream = len(self._asked) % 2 == 0
            asking_it = self._pool.submit(ask, self._url, prompt, stream=stream, deadline_s=self._deadline_s)
            self._asked.append((prompt, asking_it))

    def ask_directly(self, prefill: Worker, decode: Worker, prompt: Prompt) -> Future[Outcome]:
        """Send one to a pair of workers now."""
        asking_it = self._pool.submit(ask_directly, prefill, decode, prompt, deadline_s=self._deadline_s)
        self._asked.append((prompt, asking_it))
        return asking_it

    def finish(self) -> Tally:
        """Wait for every client and judge what it got."""
        self._pool.shutdown()
        tally = Tally()
        for prompt, asking_it in self._asked:
            tally.add(asking_it.result(), self._truth.answer(prompt), self._deadline_s)
        return tally


class Tally:
    """The number of clients by verdict: `right`, `error` (in `causes`), `wrong`, `unclear`, `late`."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.words: set[str] = set()
        """Every cause as the client read it; `causes` has them without their numbers."""
        self.slowest_s = 0.0
        self._faults: list[str] = []
        self._lock = threading.Lock()

    def add(self, outcome: Outcome, expected: Sequence[int], deadline_s: float) -> None:
        """Count one. From any thread."""
        verdict = "late" if outcome.took_s > deadline_s else outcome.verdict(expected)
        with self._lock:
            self._count(outcome, verdict, expected)

    def _count(self, outcome: Outcome, verdict: str, expected: Sequence[int]) -> None:
        self.verdicts[verdict] += 1
        self.slowest_s = max(self.slowest_s, outcome.took_s)
        if outcome.detail:
            self.causes[_kind(outcome.detail)] += 1
            self.words.add(outcome.detail)
        if verdict not in ("right", "error"):
            self._faults.append(f"{verdict}: {outcome}, expected {list(expected)}")

    def check(self) -> Tally:
        """Everybody got the right tokens or a clear error in time."""
        assert not self._faults, "\n".join(self._faults)
        return self

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.verdicts.items()))
        causes = "".join(f"\n  {count} x {detail}" for detail, count in self.causes.most_common())
        return f"{self.verdicts.total()} requests: {counts}; slowest {self.slowest_s:.1f} s{causes}"


def _kind(detail: str) -> str:
    """A cause without what differs from request to request."""
    return re.sub(r"\d[\d.:]*", "#", detail)[:200]

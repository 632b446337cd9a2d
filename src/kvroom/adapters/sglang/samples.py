"""Room numbers for several samples of one prompt.

For `n` samples of a prompt, SGLang first sends a request that prefills the prompt, so that it is in the prefix cache,
and then one request for each sample. On both sides, all of these requests carry the room number of the prompt, so all
but one of them would be refused because the room is in use. Both servers send the requests in the same order, so both
can derive the same numbers for them: the k-th request with a number gets the room `sample_room(number, k)`.

This applies only to requests with `n` above 1. SGLang itself gives each prompt of a list its own number, by counting up
from the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any

# The number of requests sent so far for each room number, while SGLang expands a request into samples; else None.
_sent: ContextVar[Counter[int] | None] = ContextVar("kvroom_sent", default=None)


def sample_room(room: int, sample: int) -> int:
    """Return the room of request `sample`, counted from 0, that carries the number `room`. Request 0 keeps the number.

    The others get a hash in [1, 2**63). The numbers that follow `room` would not do, because they may be those of other
    prompts.
    """
    if sample == 0:
        return room
    digest = blake2b(f"{room}/{sample}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def count_samples(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Count the requests of each room if a request takes samples. Runs around SGLang's expansion into requests."""
    answers = original(manager, obj, *args, **kwargs)
    return answers if getattr(obj, "parallel_sample_num", 1) == 1 else _counted(answers)


async def _counted(answers: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
    """Yield `answers`, and set `_sent` only while SGLang's code runs.

    The variable belongs to the context of the caller, which may stop in the middle. Therefore it is reset before each
    answer is yielded.
    """
    counted: Counter[int] = Counter()
    async with aclosing(answers):
        while True:
            _sent.set(counted)
            try:
                answer = await anext(answers)
            except StopAsyncIteration:
                return
            finally:
                _sent.set(None)
            yield answer


def number_sample(manager: Any, tokenized: Any) -> None:  # noqa: ARG001 - a BEFORE hook
    """Give each further sample its own room. Runs before a request goes to the scheduler."""
    sent, room = _sent.get(), getattr(tokenized, "bootstrap_room", None)
    if sent is not None and type(room) is int:
        tokenized.bootstrap_room = sample_room(room, sent[room])
        sent[room] += 1

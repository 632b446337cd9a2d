"""Room numbers for the samples of one prompt.

SGLang takes `n` samples of a prompt in two steps: it prefills the prompt once, to have it in the prefix cache, and then
sends one request for each sample. All of them carry the room number of the prompt, on both sides, so all but one would
be refused as "room in use". Both servers take the same steps in the same order, so both can derive the same further
numbers from the first one: the k-th request with a number gets `sample_room(number, k)`.

Only requests with `n` above 1 are touched. Of a list of prompts each has a number of its own already, which SGLang
derives by counting up from the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any

_sent: ContextVar[Counter[int] | None] = ContextVar("kvroom_sent", default=None)


def sample_room(room: int, sample: int) -> int:
    """Return the room of the `sample`-th request that uses the number `room`; 0 is the first, which keeps it.

    A hash and not a sum, because the numbers that follow may be those of other prompts. In [1, 2**63).
    """
    if sample == 0:
        return room
    digest = blake2b(f"{room}/{sample}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def count_samples(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Around SGLang's expansion of a request into several: count the requests of each room if it takes samples."""
    answers = original(manager, obj, *args, **kwargs)
    return answers if getattr(obj, "parallel_sample_num", 1) == 1 else _counted(answers)


async def _counted(answers: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
    """Count only while SGLang's code runs, so that a generator which is left in the middle leaves nothing behind."""
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
    """Before a request goes to the scheduler: give a further sample its own room."""
    sent, room = _sent.get(), getattr(tokenized, "bootstrap_room", None)
    if sent is not None and type(room) is int:
        tokenized.bootstrap_room = sample_room(room, sent[room])
        sent[room] += 1

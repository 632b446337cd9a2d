"""The prefill engine: computes prompts in chunks and hands each chunk over while the next one is computed.

The room is opened when the request comes in, so that a decode worker finds it, whatever waits for pages here. Pages
of a request stay its own until its room says that nobody reads them any more.

What a prompt begins with may be in the prefix cache: then it is not computed again, and is sent if the decode side
lacks it. A full page is filed there as soon as it is computed, whatever becomes of its room: peers only read it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvroom import Aux, KVPoll, KVSender, encode_aux
from kvroom.engine.attention import Chunk
from kvroom.engine.lease import Lease
from kvroom.engine.loop import EngineLoop, OpenManager
from kvroom.engine.model import forward
from kvroom.engine.options import EngineOptions
from kvroom.engine.request import FirstToken, PrefillResult, Request
from kvroom.engine.sampling import Sampler
from kvroom.engine.weights import LoadedModel
from kvroom.errors import KVRoomError, LimitExceeded, RoomFailed, RoomInUse


class _PromptJob:
    """One prompt on its way through this engine."""

    def __init__(self, request: Request, lease: Lease, keys: tuple[bytes, ...]) -> None:
        self.request = request
        self.lease = lease
        self.keys = keys  # of the prompt's full pages
        self.outcome: Future[PrefillResult] = Future()
        self.outcome.set_running_or_notify_cancel()  # only the engine's thread ends it
        self.queued_until = 0.0
        self.sender: KVSender | None = None
        self.computed = 0  # prompt tokens that are in its pages
        self.sent = 0  # of these
        self.first_token: FirstToken | None = None

    @property
    def remaining(self) -> int:
        return len(self.request.prompt_ids) - self.computed


class _Parting(NamedTuple):
    """A room that failed before a decode worker came: kept so that it is told, but not for ever."""

    sender: KVSender
    until: float


class PrefillEngine(EngineLoop):
    """Await `prefill` for each request. Thread-safe; every coroutine may live on any event loop."""

    def __init__(self, model: LoadedModel, options: EngineOptions, open_manager: OpenManager) -> None:
        self._waiting: deque[_PromptJob] = deque()
        self._running: list[_PromptJob] = []  # they hold pages; oldest first
        self._parting: list[_Parting] = []
        super().__init__(model, options, open_manager, chunk_tokens=options.chunk_tokens)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that this engine can never serve. Nothing is touched."""
        super().check(request)
        self.pool.check_fits(len(request.prompt_ids))

    async def prefill(self, request: Request) -> PrefillResult:
        """Compute the prompt, sample the first token and hand both over; return when the decode side has them.

        Raises `InvalidRequest` before the room is touched (see `refuse`), `RoomFailed` when the hand-off failed,
        `LimitExceeded` when too many requests are open or no pages became free in time. If it raises anything but
        `InvalidRequest`, or is cancelled, the room is aborted and the decode side told why; nothing is left to do for
        the caller.
        """
        self.check(request)
        job = _PromptJob(request, Lease(self.pool), self._keys(request.prompt_ids, request.cache_salt))
        try:
            self._admit(partial(self._submit, job))
        except KVRoomError as fault:
            self.refuse(request.bootstrap_room, str(fault))
            raise
        try:
            return await asyncio.wrap_future(job.outcome)
        except asyncio.CancelledError as cancelled:
            why = next(iter(cancelled.args), None) or "the client of the prefill worker left"
            self._inbox.put(partial(self._fail, job, RoomFailed(f"cancelled: {why}")))
            raise

    def refuse(self, room: int, cause: str) -> None:
        """Tell the decode worker of `room` why this side will not serve it, now or when its offer comes.

        For requests that `prefill` refused or that never became one. Does not block; keeps the room at most
        `refusal_s`. A room that is open for another request is left alone.
        """
        self._inbox.put(partial(self._refuse, room, cause))

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._settle_rooms()
        self._clear_parted()
        self._give_pages()
        # One forward call of up to `chunk_tokens` tokens, oldest prompts first; then post what is finished.
        budget = self.options.chunk_tokens
        batch: list[tuple[_PromptJob, Chunk]] = []
        for job in self._running:
            count = min(job.remaining, budget)
            if count > 0:
                tokens = job.request.prompt_ids[job.computed : job.computed + count]
                batch.append((job, job.lease.chunk(tokens, job.computed)))
                budget -= count
        if not batch:
            return
        # The logits come back to the CPU, so the keys and values of this call are written when it returns.
        logits = forward(self.model, self.pool, [chunk for _, chunk in batch])
        for (job, chunk), row in zip(batch, logits, strict=True):
            self.prompt_tokens_computed += len(chunk.tokens)
            job.computed += len(chunk.tokens)
            job.lease.file(job.keys[: job.computed // self.pool.page_tokens])
            if job.remaining == 0:
                job.first_token = FirstToken(*Sampler(job.request).choose(row), job.lease.cached_tokens)
            self._send(job)

    def _settle_rooms(self) -> None:
        for job in [*self._waiting, *self._running]:
            assert job.sender is not None  # opened before the job was queued
            if job.sender.poll() not in (KVPoll.Failed, KVPoll.Success):
                continue
            try:
                done = job.sender.wait()  # it has ended: this does not block
                assert job.first_token is not None  # a room succeeds after its last chunk, which carries it
                job.sender.clear()
                self._running.remove(job)
                self._end(job, succeeded=True)
                result = PrefillResult(
                    first_token=job.first_token,
                    prompt_tokens=len(job.request.prompt_ids),
                    pages=len(job.lease.pages),
                    nbytes=done.nbytes,
                    transport=done.transport,
                    handoff_s=done.latency_s,
                )
                job.outcome.set_result(result)
            except KVRoomError as fault:
                self._fail(job, fault)

    def _give_pages(self) -> None:
        """First come, first served: a long prompt at the head is not overtaken, so it cannot starve."""
        while self._waiting and len(self._running) < self.options.max_running:
            job = self._waiting[0]
            tokens = len(job.request.prompt_ids)
            if not job.lease.take(tokens, job.keys[: (tokens - 1) // self.pool.page_tokens]):  # the last is computed
                break
            self._running.append(self._waiting.popleft())
            job.computed = job.lease.cached_tokens
            self.prompt_tokens_cached += job.computed
            if job.computed:
                self._send(job)
        now = time.monotonic()
        for job in [job for job in self._waiting if job.queued_until <= now]:
            waited = f"no pages became free within {self.options.queue_s:g} s (queue_s): {self.pool.summary()}"
            self._fail(job, LimitExceeded(waited))

    def _send(self, job: _PromptJob) -> None:
        """Post what is in the pages and was not posted before. The room moves of it what the decode side lacks."""
        assert job.sender is not None  # a job with pages has its room
        pages = job.lease.pages[job.sent // self.pool.page_tokens : self.pool.pages_for(job.computed)]
        last = job.remaining == 0
        aux = b""
        if (first := job.first_token) is not None:
            aux = encode_aux(
                Aux(
                    tokens=job.computed,
                    first_token=first.token_id,
                    first_logprob=first.logprob,
                    cached_tokens=first.cached_tokens,
                )
            )
        windows = job.lease.windows(job.computed) if last else {}
        job.sender.send(pages, stop=job.computed, last=last, aux=aux, windows=windows)
        job.sent = job.computed

    # -- requests come and go ------------------------------------------------------------------------------------------

    def _submit(self, job: _PromptJob) -> None:
        give_back = job.lease.give_back
        job.lease.lend()
        try:
            job.sender = self.manager.sender(
                job.request.bootstrap_room,
                identity=job.request.identity,
                on_release=lambda _pages: self._inbox.put(give_back),
            )
        except KVRoomError as fault:
            give_back()
            self._end(job)
            job.outcome.set_exception(fault)
            return
        job.queued_until = time.monotonic() + self.options.queue_s
        self._waiting.append(job)

    def _fail(self, job: _PromptJob, fault: KVRoomError) -> None:
        """End a request that is not over yet: abort its room, and keep that until the decode side can know."""
        if job.outcome.done():
            return
        if job in self._running:
            self._running.remove(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        if job.sender is not None:
            job.sender.abort(str(fault))
            self._part(job.sender)
        self._end(job)
        job.outcome.set_exception(fault)

    def _end(self, job: _PromptJob, *, succeeded: bool = False) -> None:
        job.lease.drop()
        self._leave(succeeded=succeeded)

    def _refuse(self, room: int, cause: str) -> None:
        try:
            sender = self.manager.sender(room)
        except KVRoomError:
            return  # the room is open for another request, whose end its decode side will hear
        sender.abort(cause)
        self._part(sender)

    def _part(self, sender: KVSender) -> None:
        self._parting.append(_Parting(sender, time.monotonic() + self.options.refusal_s))

    def _due(self) -> float | None:
        if any(job.remaining for job in self._running):
            return 0.0
        ends = [job.queued_until for job in self._waiting] + [parting.until for parting in self._parting]
        return min(ends, default=None)

    def _counts(self) -> tuple[int, int, int]:
        return len(self._waiting), len(self._running), len(self._parting)

    def _fail_all(self, cause: str) -> None:
        for job in [*self._waiting, *self._running]:
            self._fail(job, KVRoomError(cause))

    def _clear_parted(self) -> None:
        now = time.monotonic()
        for parting in list(self._parting):
            sender = parting.sender
            never_opened = False  # its number belongs to another request, whose end its decode worker will hear
            try:
                sender.failure_exception()
            except RoomInUse:
                never_opened = True
            except RoomFailed:
                pass
            if sender.answered or parting.until <= now or self._closing or never_opened:
                self._parting.remove(parting)
                sender.clear()

"""The prefill engine: computes prompts in chunks and hands each chunk over while it computes the next one.

The room is opened as soon as the request arrives, so that a decode worker finds it even while the request waits for
pages. The pages of a request are not reused before its room has released them: a peer may still read them.

If the prefix cache holds the first pages of a prompt, they are not computed again, and are sent only if the decode
side lacks them. A full page enters the cache as soon as it is computed, even if its room fails later, because peers
only read it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from kvroom import Aux, KVPoll, KVSender, RequestTrace, encode_aux
from kvroom.errors import KVRoomError, LimitExceeded, RoomFailed, RoomInUse

from .attention import Chunk
from .lease import Lease
from .loop import EngineLoop, OpenManager
from .model import forward
from .options import EngineOptions
from .request import FirstToken, PrefillResult, Request
from .sampling import Sampler
from .weights import LoadedModel


class _PromptJob:
    """The state of one request in this engine."""

    def __init__(self, request: Request, lease: Lease, keys: tuple[bytes, ...]) -> None:
        self.request = request
        self.lease = lease
        self.keys = keys  # of the prompt's full pages
        self.outcome: Future[PrefillResult] = Future()
        self.outcome.set_running_or_notify_cancel()  # only the engine's thread ends it
        self.queued_until = 0.0
        self.sender: KVSender | None = None
        self.computed = 0  # prompt tokens whose keys and values are in the pages
        self.sent = 0  # prompt tokens that were posted to the room; at most `computed`
        self.first_token: FirstToken | None = None

    @property
    def remaining(self) -> int:
        """Prompt tokens that are still to be computed."""
        return len(self.request.prompt_ids) - self.computed


class _Parting(NamedTuple):
    """A failed room that is kept `until` (`time.monotonic`), so that a late decode worker still gets the cause."""

    sender: KVSender
    until: float


class PrefillEngine(EngineLoop):
    """The prefill side of a hand-off: await `prefill` for each request.

    Thread-safe: `prefill` may be awaited on any event loop, and on several at a time.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions, open_manager: OpenManager) -> None:
        self._waiting: deque[_PromptJob] = deque()
        self._running: list[_PromptJob] = []  # jobs that hold pages, oldest first
        self._parting: list[_Parting] = []
        super().__init__(model, options, open_manager, chunk_tokens=options.chunk_tokens)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that this engine can never serve. Changes nothing."""
        super().check(request)
        self.pool.check_fits(len(request.prompt_ids))

    async def prefill(self, request: Request) -> PrefillResult:
        """Compute the prompt, sample the first token and hand both over; return when the decode side has them.

        After any exception except `InvalidRequest`, and after a cancellation, the room is aborted and the decode side
        receives the cause. The caller need not clean up.

        Raises:
            InvalidRequest: This engine can never serve the request. The room was not opened; see `refuse`.
            LimitExceeded: Too many requests are open, or the request waited for pages longer than `queue_s`.
            RoomFailed: The hand-off failed; the error names the cause.
            KVRoomError: The engine has ended, or the room number is in use.
        """
        self.check(request)
        job = _PromptJob(request, Lease(self.pool), self._keys(request.prompt_ids, request.cache_salt))
        try:
            self._admit(partial(self._submit, job))
        except KVRoomError as error:
            self.refuse(request.bootstrap_room, str(error), trace=request.trace)
            raise
        try:
            return await asyncio.wrap_future(job.outcome)
        except asyncio.CancelledError as cancelled:
            why = next(iter(cancelled.args), None) or "the client of the prefill worker left"
            self._inbox.put(partial(self._fail, job, RoomFailed(f"cancelled: {why}")))
            raise

    def refuse(self, room: int, detail: str, *, trace: RequestTrace | None = None) -> None:
        """Tell the decode worker of `room`, now or when its offer arrives, why the prefill side refused the request.

        For requests that `prefill` refused, or that were invalid before that. Thread-safe, and does not block. The room
        is kept for at most `refusal_s`. A room that is open for another request stays as it is. `trace` names the
        request in the log.
        """
        self._inbox.put(partial(self._refuse, room, detail, trace))

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._settle_rooms()
        self._clear_parted()
        self._assign_pages()
        # One forward call of up to `chunk_tokens` tokens, oldest prompts first. Then post the finished chunks.
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
        # `forward` copies the logits to the CPU, which waits for the device. So all keys and values of this call are
        # in memory when it returns, and a transport may read them.
        logits = forward(self.model, self.pool, [chunk for _, chunk in batch])
        for (job, chunk), row in zip(batch, logits, strict=True):
            self.prompt_tokens_computed += len(chunk.tokens)
            job.computed += len(chunk.tokens)
            job.lease.commit(job.keys[: job.computed // self.pool.page_tokens])
            if job.remaining == 0:
                job.first_token = FirstToken(*Sampler(job.request).choose(row), job.lease.cached_tokens)
            self._send(job)

    def _settle_rooms(self) -> None:
        for job in [*self._waiting, *self._running]:
            assert job.sender is not None  # opened before the job was queued
            if job.sender.poll() not in (KVPoll.Failed, KVPoll.Success):
                continue
            try:
                done = job.sender.wait()  # the room has ended, so this does not block
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
            except KVRoomError as error:
                self._fail(job, error)

    def _assign_pages(self) -> None:
        """Allocate pages for waiting requests, first come, first served.

        No request overtakes a long prompt at the head of the queue, so that prompt cannot starve.
        """
        while self._waiting and len(self._running) < self.options.max_running:
            job = self._waiting[0]
            tokens = len(job.request.prompt_ids)
            # The page of the last token is never shared, because its logits have to be computed.
            if not job.lease.take(tokens, job.keys[: (tokens - 1) // self.pool.page_tokens]):
                break
            self._running.append(self._waiting.popleft())
            job.computed = job.lease.cached_tokens
            self.prompt_tokens_cached += job.computed
            if job.computed:
                self._send(job)
        now = time.monotonic()
        for job in [job for job in self._waiting if job.queued_until <= now]:
            waited = f"timed out after {self.options.queue_s:g} s (queue_s) waiting for free pages"
            self._fail(job, LimitExceeded(f"{waited}: {self.pool.summary()}"))

    def _send(self, job: _PromptJob) -> None:
        """Post the computed pages that were not posted yet. The room transfers those that the decode side lacks."""
        assert job.sender is not None  # the room was opened before the job got pages
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

    # -- requests begin and end ----------------------------------------------------------------------------------------

    def _submit(self, job: _PromptJob) -> None:
        detach_room = job.lease.detach_room
        job.lease.attach_room()
        try:
            job.sender = self.manager.sender(
                job.request.bootstrap_room,
                identity=job.request.identity,
                trace=job.request.trace,
                on_release=lambda _pages: self._inbox.put(detach_room),
            )
        except KVRoomError as error:
            detach_room()
            self._end(job)
            job.outcome.set_exception(error)
            return
        job.queued_until = time.monotonic() + self.options.queue_s
        self._waiting.append(job)

    def _fail(self, job: _PromptJob, error: KVRoomError) -> None:
        """End a request that has not ended yet: abort its room, and keep the room until the decode side has the cause.

        `error` is raised in the caller of `prefill`.
        """
        if job.outcome.done():
            return
        if job in self._running:
            self._running.remove(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        if job.sender is not None:
            job.sender.abort(str(error))
            self._part(job.sender)
        self._end(job)
        job.outcome.set_exception(error)

    def _end(self, job: _PromptJob, *, succeeded: bool = False) -> None:
        job.lease.drop()
        self._leave(succeeded=succeeded)

    def _refuse(self, room: int, detail: str, trace: RequestTrace | None) -> None:
        try:
            sender = self.manager.sender(room, trace=trace)
        except KVRoomError:
            return  # the room is open for another request, and its decode side will receive the end of that request
        sender.abort(detail)
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

    def _fail_all(self, detail: str) -> None:
        for job in [*self._waiting, *self._running]:
            self._fail(job, KVRoomError(detail))

    def _clear_parted(self) -> None:
        now = time.monotonic()
        for parting in list(self._parting):
            sender = parting.sender
            # True if another request has the room's number: the decode side will receive the end of that request.
            never_opened = False
            try:
                sender.failure_exception()
            except RoomInUse:
                never_opened = True
            except RoomFailed:
                pass
            if sender.answered or parting.until <= now or self._closing or never_opened:
                self._parting.remove(parting)
                sender.clear()

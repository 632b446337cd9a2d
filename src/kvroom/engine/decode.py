"""The decode engine: receives prompts that a prefill engine computed, and continues all of them together.

Each step is one forward call with one token for every running request. A request gets the pages for its prompt and for
every token that it may generate before it starts, so a running request never waits for memory. It computes no prompt
token: it starts from the pages and the first token that its room delivered.

If the prefix cache holds the first pages of a prompt, the room transfers only the remaining ones. A page that a room
may write belongs to one request alone. It enters the cache after the room has succeeded, and never if the room fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

from kvroom import HandOff, KVPoll, KVReceiver, RequestTrace, decode_aux
from kvroom.errors import (
    AddressNotAllowed,
    ConfigurationError,
    InvalidRequest,
    KVRoomError,
    LimitExceeded,
    LocalRoomError,
    RemoteProtocolError,
    RoomFailed,
)
from kvroom.network import parse_address

from .lease import Lease
from .loop import EngineLoop, OpenManager
from .model import forward
from .options import EngineOptions
from .request import FinishReason, GenerationStats, Request, TokenEvent
from .sampling import Sampler
from .text import TextStream
from .weights import LoadedModel


class _Generation:
    """The state of one request in this engine, and the queue of events to its consumer."""

    def __init__(self, request: Request, lease: Lease, keys: tuple[bytes, ...], text: TextStream) -> None:
        self.request = request
        self.lease = lease
        self.keys = keys  # of the prompt's full pages
        self.text = text
        self.sampler = Sampler(request, drawn=1)  # the prefill side drew the first token
        self.started = time.monotonic()
        self.queued_until = 0.0
        self.receiver: KVReceiver | None = None
        self.hand_off: HandOff | None = None
        self.cached_tokens = 0  # prompt tokens that the prefill side found in its cache
        self.tokens: list[int] = []  # generated so far
        self.prompt_tokens_computed = 0
        self.ttft_s = 0.0
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | KVRoomError] = asyncio.Queue()

    @property
    def position(self) -> int:
        """Position of the newest token, the only one whose keys and values are not in a page yet."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1

    def deliver(self, event: TokenEvent | KVRoomError) -> bool:
        """Pass an event to the consumer, from the engine's thread. Return False if its event loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            return False
        return True

    async def next(self) -> TokenEvent:
        event = await self._events.get()
        if isinstance(event, KVRoomError):
            raise event
        return event


class DecodeEngine(EngineLoop):
    """The decode side of a hand-off: iterate over `generate` for each request.

    Thread-safe: `generate` may be called from any thread with a running event loop, and from several at a time.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions, open_manager: OpenManager) -> None:
        self._waiting: deque[_Generation] = deque()
        self._transferring: list[_Generation] = []
        self._running: list[_Generation] = []
        super().__init__(model, options, open_manager, chunk_tokens=1)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that this engine can never serve. Changes nothing."""
        super().check(request)
        try:
            self.manager.allowed.check(parse_address(request.bootstrap_addr))
        except (AddressNotAllowed, ConfigurationError) as error:
            raise InvalidRequest(str(error)) from None
        self.pool.check_fits(len(request.prompt_ids) + request.max_tokens)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Yield a `TokenEvent` for each generated token; the last one has a finish reason and the statistics.

        Closing the generator, or cancelling the task that waits in it, aborts the room and ends the request. Its pages
        become free as soon as no peer can write into them.

        Raises:
            InvalidRequest: This engine can never serve the request. No room was opened.
            LimitExceeded: Too many requests are open, or the request waited for pages longer than `queue_s`.
            RoomFailed: The hand-off failed; the error names the cause.
            KVRoomError: The engine has ended, or the prefill side sent an invalid first token.
        """
        self.check(request)
        keys = self._keys(request.prompt_ids, request.cache_salt)
        job = _Generation(request, Lease(self.pool), keys, TextStream(self.model.tokenizer, request.stop))
        try:
            self._admit(partial(self._submit, job))
        except KVRoomError as error:
            self.refuse(request.bootstrap_addr, request.bootstrap_room, str(error), trace=request.trace)
            raise
        try:
            while True:
                event = await job.next()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._inbox.put(partial(self._fail, job, RoomFailed("cancelled: the client of the decode worker left")))

    def refuse(self, bootstrap_addr: str, room: int, detail: str, *, trace: RequestTrace | None = None) -> None:
        """Tell the prefill worker of `room` why the decode side refused the request.

        For requests that were refused before their room was opened. Thread-safe, and does not block. The room is
        cleared before this returns. `trace` names the request in the log.
        """
        # A closed manager raises. Its links are gone by then, and the prefill side ends its room because of that.
        with contextlib.suppress(LocalRoomError):
            receiver = self.manager.receiver(bootstrap_addr, room, trace=trace)
            receiver.abort(detail)
            receiver.clear()

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._offer_pages()
        self._start_arrived()
        jobs = list(self._running)
        if not jobs:
            return
        # One token for every running request, in one forward call.
        logits = forward(self.model, self.pool, [job.lease.chunk(job.tokens[-1:], job.position) for job in jobs])
        for job, row in zip(jobs, logits, strict=True):
            computed = int(job.position < len(job.request.prompt_ids))
            job.prompt_tokens_computed += computed
            self.prompt_tokens_computed += computed
            self._take_token(job, *job.sampler.choose(row))

    def _offer_pages(self) -> None:
        """Allocate pages for waiting requests, first come, first served, and offer them to their prefill sides."""
        while self._waiting and len(self._transferring) + len(self._running) < self.options.max_running:
            job = self._waiting[0]
            if not job.lease.take(len(job.request.prompt_ids) + job.request.max_tokens, job.keys):
                break
            self._waiting.popleft()
            self._open_room(job)
        now = time.monotonic()
        for job in [job for job in self._waiting if job.queued_until <= now]:
            waited = f"timed out after {self.options.queue_s:g} s (queue_s) waiting for free pages"
            self._fail(job, LimitExceeded(f"{waited}: {self.pool.summary()}"))

    def _open_room(self, job: _Generation) -> None:
        request, detach_room = job.request, job.lease.detach_room
        job.lease.attach_room(job.lease.shared)
        try:
            job.receiver = self.manager.receiver(
                request.bootstrap_addr,
                request.bootstrap_room,
                identity=request.identity,
                trace=request.trace,
                on_release=lambda _pages: self._inbox.put(detach_room),
            )
        except KVRoomError as error:
            detach_room()
            self._fail(job, error)
            return
        self._transferring.append(job)
        prompt_tokens, prefix_tokens = len(request.prompt_ids), job.lease.cached_tokens
        self.prompt_tokens_cached += prefix_tokens
        pages = job.lease.pages[job.lease.shared : self.pool.pages_for(prompt_tokens)]
        self.pool.book.check_writable(pages)
        windows = job.lease.windows(prompt_tokens)
        job.receiver.send_metadata(pages, tokens=prompt_tokens, decode_prefix_len=prefix_tokens, windows=windows)

    def _start_arrived(self) -> None:
        for job in list(self._transferring):
            assert job.receiver is not None  # `_open_room` opens it before it adds the job to this list
            if job.receiver.poll() not in (KVPoll.Failed, KVPoll.Success):
                continue
            try:
                job.hand_off = job.receiver.wait()  # the room has ended, so this does not block
                aux = decode_aux(job.hand_off.aux)
                if aux.first_token is None or aux.first_token >= self.model.vocab_size:
                    outside = f"token {aux.first_token}, outside [0, {self.model.vocab_size})"
                    raise RemoteProtocolError(f"invalid first token from the prefill worker: {outside}")
                if aux.cached_tokens >= len(job.request.prompt_ids):
                    wrong = f"{aux.cached_tokens} cached tokens of a prompt of {len(job.request.prompt_ids)}"
                    raise RemoteProtocolError(f"invalid metadata with the first token from the prefill worker: {wrong}")
            except KVRoomError as error:
                self._fail(job, error)
                continue
            # The prompt has landed: continue from the token that the prefill side sampled.
            job.receiver.clear()
            job.receiver = None
            job.ttft_s = time.monotonic() - job.started
            job.cached_tokens = aux.cached_tokens
            self._commit(job, job.keys)
            self._transferring.remove(job)
            self._running.append(job)
            self._take_token(job, aux.first_token, aux.first_logprob)

    def _take_token(self, job: _Generation, token_id: int, logprob: float | None) -> None:
        """Append a token to its request, deliver it to the consumer, and end the request if it was the last one."""
        job.tokens.append(token_id)
        ended = not job.request.ignore_eos and token_id in self.model.eos_ids
        text, stopped = job.text.push(token_id)
        reason: FinishReason | None = None
        if stopped or ended:
            reason = "stop"
        elif len(job.tokens) == job.request.max_tokens:
            reason = "length"
        if reason is not None and not stopped:
            text += job.text.finish().text
        stats: GenerationStats | None = None
        if reason is not None:
            assert job.hand_off is not None  # no token exists before the hand-off
            prompt_tokens = len(job.request.prompt_ids)
            stats = GenerationStats(
                prompt_tokens=prompt_tokens,
                completion_tokens=len(job.tokens),
                cached_tokens=job.cached_tokens,
                prefix_tokens=job.lease.cached_tokens,
                prompt_tokens_computed=job.prompt_tokens_computed,
                pages=self.pool.pages_for(prompt_tokens) - job.lease.shared,
                nbytes=job.hand_off.nbytes,
                transport=job.hand_off.transport,
                handoff_s=job.hand_off.latency_s,
                ttft_s=job.ttft_s,
            )
        event = TokenEvent(token_id=token_id, text=text, logprob=logprob, finish_reason=reason, stats=stats)
        if reason is not None:
            self._end(job, succeeded=True)
        if not job.deliver(event):
            self._fail(job, RoomFailed("cancelled: the event loop of its consumer is closed"))

    # -- requests begin and end ----------------------------------------------------------------------------------------

    def _submit(self, job: _Generation) -> None:
        job.queued_until = time.monotonic() + self.options.queue_s
        self._waiting.append(job)

    def _fail(self, job: _Generation, error: KVRoomError) -> None:
        """End a request that has not ended yet, abort its room if it has one, and raise `error` in its consumer."""
        if job.ended:
            return
        if job.receiver is not None:
            job.receiver.abort(str(error))
            job.receiver.clear()
            job.receiver = None
        elif job in self._waiting:
            request = job.request
            self.refuse(request.bootstrap_addr, request.bootstrap_room, str(error), trace=request.trace)
        self._end(job)
        job.deliver(error)

    def _end(self, job: _Generation, *, succeeded: bool = False) -> None:
        job.ended = True
        if job in self._running:
            # This engine wrote the generated tokens itself. The newest one is not in a page yet.
            request = job.request
            self._commit(job, self._keys((*request.prompt_ids, *job.tokens[:-1]), request.cache_salt, known=job.keys))
        for jobs in (self._waiting, self._transferring, self._running):
            if job in jobs:
                jobs.remove(job)
        job.lease.drop()
        self._leave(succeeded=succeeded)

    def _commit(self, job: _Generation, keys: tuple[bytes, ...]) -> None:
        """Publish the pages of `keys` to the prefix cache, if both sides of the room compared their cache salts.

        Keys identify the tokens and the salt of a request. A different prefill engine that does not state its salt may
        have computed the prompt for another tenant, so its pages serve this request and no other.
        """
        if job.hand_off is not None and "cache_salt" in job.hand_off.compared:
            job.lease.commit(keys)

    def _due(self) -> float | None:
        if self._running:
            return 0.0
        return min((job.queued_until for job in self._waiting), default=None)

    def _counts(self) -> tuple[int, int, int]:
        return len(self._waiting), len(self._transferring) + len(self._running), 0

    def _fail_all(self, detail: str) -> None:
        for job in [*self._waiting, *self._transferring, *self._running]:
            self._fail(job, KVRoomError(detail))

    def _clear_parted(self) -> None:
        """Do nothing: a decode room is cleared when it fails, and the manager sends the abort to each offered peer."""

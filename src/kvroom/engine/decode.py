"""The decode engine: takes prompts that somebody else computed, and continues all of them in one forward call a step.

A request takes the pages for its prompt and for every token it may generate at once, so a running request never waits
for memory. It computes no prompt token: it starts from the pages and the first token that its room brought.

What a prompt begins with may be in the prefix cache: then only the rest is asked for. A page that a room may write is
its request's alone; it is filed in the cache when the room has succeeded, and not at all if it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial

from kvroom import HandOff, KVPoll, KVReceiver, decode_aux
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
    """One generation on its way through this engine."""

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
        self.cached_tokens = 0  # of the prompt, on the prefill side
        self.tokens: list[int] = []  # generated so far
        self.prompt_tokens_computed = 0
        self.ttft_s = 0.0
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | KVRoomError] = asyncio.Queue()

    @property
    def position(self) -> int:
        """Where the newest token goes: the only one whose keys and values are in no page yet."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1

    def tell(self, event: TokenEvent | KVRoomError) -> bool:
        """Pass an event to the consumer, from the engine's thread. False: its event loop is closed."""
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
    """Iterate over `generate` for each request. Thread-safe; every consumer may live on any event loop."""

    def __init__(self, model: LoadedModel, options: EngineOptions, open_manager: OpenManager) -> None:
        self._waiting: deque[_Generation] = deque()
        self._transferring: list[_Generation] = []
        self._running: list[_Generation] = []
        super().__init__(model, options, open_manager, chunk_tokens=1)

    def check(self, request: Request) -> None:
        """Raise `InvalidRequest` for a request that this engine can never serve. Nothing is touched."""
        super().check(request)
        try:
            self.manager.allowed.check(parse_address(request.bootstrap_addr))
        except (AddressNotAllowed, ConfigurationError) as error:
            raise InvalidRequest(str(error)) from None
        self.pool.check_fits(len(request.prompt_ids) + request.max_tokens)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Yield a `TokenEvent` for each generated token; the last one has a finish reason and the statistics.

        Raises, before the first event, `InvalidRequest` or `LimitExceeded`; later `RoomFailed` and `LimitExceeded`.
        Closing the generator, or cancelling who waits in it, aborts the room and gives up the request; its pages come
        back as soon as no peer can write into them.
        """
        self.check(request)
        keys = self._keys(request.prompt_ids, request.cache_salt)
        job = _Generation(request, Lease(self.pool), keys, TextStream(self.model.tokenizer, request.stop))
        try:
            self._admit(partial(self._submit, job))
        except KVRoomError as error:
            self.refuse(request.bootstrap_addr, request.bootstrap_room, str(error))
            raise
        try:
            while True:
                event = await job.next()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._inbox.put(partial(self._fail, job, RoomFailed("cancelled: the client of the decode worker left")))

    def refuse(self, bootstrap_addr: str, room: int, detail: str) -> None:
        """Tell the prefill worker of `room` why this side will not take it. Thread-safe, does not block, keeps nothing.

        For requests that `generate` refused before their room was opened.
        """
        with contextlib.suppress(LocalRoomError):  # closed: then the link is gone, and the prefill side knows by that
            receiver = self.manager.receiver(bootstrap_addr, room)
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
        """First come, first served: take the pages of a request and offer those of its prompt to the prefill side."""
        while self._waiting and len(self._transferring) + len(self._running) < self.options.max_running:
            job = self._waiting[0]
            if not job.lease.take(len(job.request.prompt_ids) + job.request.max_tokens, job.keys):
                break
            self._waiting.popleft()
            self._open_room(job)
        now = time.monotonic()
        for job in [job for job in self._waiting if job.queued_until <= now]:
            waited = f"no pages became free within {self.options.queue_s:g} s (queue_s): {self.pool.summary()}"
            self._fail(job, LimitExceeded(waited))

    def _open_room(self, job: _Generation) -> None:
        request, give_back = job.request, job.lease.give_back
        job.lease.lend(job.lease.shared)
        try:
            job.receiver = self.manager.receiver(
                request.bootstrap_addr,
                request.bootstrap_room,
                identity=request.identity,
                on_release=lambda _pages: self._inbox.put(give_back),
            )
        except KVRoomError as error:
            give_back()
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
            assert job.receiver is not None  # opened before it was filed here
            if job.receiver.poll() not in (KVPoll.Failed, KVPoll.Success):
                continue
            try:
                job.hand_off = job.receiver.wait()  # it has ended: this does not block
                aux = decode_aux(job.hand_off.aux)
                if aux.first_token is None or aux.first_token >= self.model.vocab_size:
                    outside = f"token {aux.first_token}, outside [0, {self.model.vocab_size})"
                    raise RemoteProtocolError(f"the prefill worker sent as first token {outside}")
                if aux.cached_tokens >= len(job.request.prompt_ids):
                    wrong = f"{aux.cached_tokens} cached tokens of a prompt of {len(job.request.prompt_ids)}"
                    raise RemoteProtocolError(f"the prefill worker sent with its first token {wrong}")
            except KVRoomError as error:
                self._fail(job, error)
                continue
            # The prompt is here: go on from the token that the prefill side drew.
            job.receiver.clear()
            job.receiver = None
            job.ttft_s = time.monotonic() - job.started
            job.cached_tokens = aux.cached_tokens
            self._file(job, job.keys)
            self._transferring.remove(job)
            self._running.append(job)
            self._take_token(job, aux.first_token, aux.first_logprob)

    def _take_token(self, job: _Generation, token_id: int, logprob: float | None) -> None:
        """Append a token to its request, tell the consumer, and end the request if this was its last."""
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
            assert job.hand_off is not None  # a token comes after the hand-off
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
        if not job.tell(event):
            self._fail(job, RoomFailed("cancelled: the event loop of its consumer is closed"))

    # -- requests come and go ------------------------------------------------------------------------------------------

    def _submit(self, job: _Generation) -> None:
        job.queued_until = time.monotonic() + self.options.queue_s
        self._waiting.append(job)

    def _fail(self, job: _Generation, error: KVRoomError) -> None:
        """End a request that is not over yet, and abort its room if it has one."""
        if job.over:
            return
        if job.receiver is not None:
            job.receiver.abort(str(error))
            job.receiver.clear()
            job.receiver = None
        elif job in self._waiting:
            self.refuse(job.request.bootstrap_addr, job.request.bootstrap_room, str(error))
        self._end(job)
        job.tell(error)

    def _end(self, job: _Generation, *, succeeded: bool = False) -> None:
        job.over = True
        if job in self._running:  # what it generated was written here, all of it but its newest token
            request = job.request
            self._file(job, self._keys((*request.prompt_ids, *job.tokens[:-1]), request.cache_salt, known=job.keys))
        for jobs in (self._waiting, self._transferring, self._running):
            if job in jobs:
                jobs.remove(job)
        job.lease.drop()
        self._leave(succeeded=succeeded)

    def _file(self, job: _Generation, keys: tuple[bytes, ...]) -> None:
        """File the pages of `keys` in the prefix cache, unless a part of what the keys name was not compared.

        Keys name the tokens and the salt of a request. An engine of another make that does not state its salt may have
        computed the prompt for another tenant; its pages serve this request and no other.
        """
        if job.hand_off is not None and "cache_salt" in job.hand_off.compared:
            job.lease.file(keys)

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
        """Nothing to do: a decode room is cleared as it fails, and whoever saw its offer gets the abort."""

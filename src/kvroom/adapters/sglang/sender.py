"""The prefill side of one request: SGLang's `BaseKVSender` over a `KVSender`.

SGLang counts in pages of its own and in chunks; a room counts in tokens. The position starts at the prefix that the
decode side already has and moves by the number of tokens that SGLang names with each chunk.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import BaseKVSender, KVTransferMetric

from kvroom import Aux, KVPoll, KVSender, encode_aux

from .identity import request_identity
from .leg import ABORTED, Leg, supervised

if TYPE_CHECKING:
    from .manager import KVRoomKVManager


class KVRoomKVSender(BaseKVSender):
    """Hands over one request. SGLang's scheduler makes it and calls it, from one thread; no call waits.

    SGLang calls `abort` on three paths that never come back: no `poll`, no `clear`. So `abort` lets the room end by
    itself, once the decode side knows why or after `bootstrap_s`.
    """

    # Asks SGLang for page numbers on the host, ready to be read: copying them later would need its CUDA events.
    supports_host_tensor_indices = False

    def __init__(
        self,
        mgr: KVRoomKVManager,
        bootstrap_addr: str,  # noqa: ARG002 - SGLang's signature; the decode side finds this rank in the directory
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,  # noqa: ARG002 - SGLang's signature; one rank has no other rank
    ) -> None:
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self.leg: Leg[KVSender] = Leg(bootstrap_room, mgr.manager.sender)
        self._early_send_wait_event: Any = None  # SGLang sets it before it sends a cached prefix
        self._delayed: Future[None] | None = None
        self._row = -1
        self._position = 0

    @supervised
    def identify(self, request: Any, queue: Any) -> None:
        """State which request this is, SGLang's `Req` in one of its queues. Called once, before anything is sent."""
        if (handle := self.leg.handle) is not None:
            self.leg.attempt(lambda: handle.identify(request_identity(request, queue)))

    @supervised
    def pop_decode_prefix_len(self) -> int:
        """Return the token from which SGLang has to send: what the decode side has, down to a page of this side.

        The decode side's pages may be smaller than this side's, and SGLang can only send whole pages from their
        beginning. What the decode side has already is cut off when the chunk is planned.
        """
        page_size = int(self.kv_mgr.kv_args.page_size)
        known = (self.leg.handle.decode_prefix_len if self.leg.handle is not None else None) or 0
        self._position = known - known % page_size
        return self._position

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:  # noqa: ARG002 - SGLang's signature
        """Take the metadata row of this request."""
        self._row = -1 if aux_index is None else aux_index

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        """Return True for chunks with pages, and for the last one, which carries the metadata even without pages."""
        return num_pages > 0 or last_chunk

    @supervised
    def send(self, kv_indices: Any, state_indices: list[Any] | None = None, num_kv_tokens: int | None = None) -> None:
        """Hand over the next chunk.

        Args:
            kv_indices: int32[pages], page numbers of tokens [position, position + num_kv_tokens).
            state_indices: a list for the last chunk, empty for a model without states; None for every other chunk.
            num_kv_tokens: tokens in the chunk; without it, whole pages.
        """
        if self.leg.handle is None or self.leg.status is KVPoll.Failed:
            return
        tokens = len(kv_indices) * int(self.kv_mgr.kv_args.page_size) if num_kv_tokens is None else num_kv_tokens
        start, self._position = self._position, self._position + tokens
        last = state_indices is not None
        aux = b""
        if last:
            # The row is read now: SGLang reuses it as soon as the request has ended on this side.
            rows = self.kv_mgr.rows
            content = rows.content(self._row)
            message = Aux(
                tokens=self._position,
                first_token=content.first_token,
                first_logprob=content.first_logprob,
                cached_tokens=content.cached_tokens,
                extra=rows.read(self._row),
            )
            aux = encode_aux(message)
        send = partial(self.leg.handle.send, kv_indices.tolist(), start=start, stop=self._position, last=last, aux=aux)
        event, self._early_send_wait_event = self._early_send_wait_event, None
        if event is None and (self._delayed is None or self._delayed.done()):
            self.leg.attempt(send)
        else:
            # The device may still be writing the pages: the adapter's thread waits for it, and keeps chunks in order.
            self._delayed = self.kv_mgr.in_background(partial(self._send_after, event, send))

    @supervised
    def poll(self) -> KVPoll:
        """Return the status of the room, which is `WaitingForInput` only after the decode side's offer."""
        return self.leg.status

    def poll_pp_consensus(self) -> KVPoll:
        """Return the minimum status over the pipeline stages, of which there is one."""
        return self.poll()

    def get_transfer_metric(self) -> KVTransferMetric:
        """Return the duration and bytes of a successful hand-off. Works after `clear`, when SGLang calls it."""
        if self.leg.handle is None or self.leg.status is not KVPoll.Success:
            return KVTransferMetric()
        done = self.leg.handle.wait(0)
        return KVTransferMetric(transfer_latency_s=done.latency_s, transfer_total_bytes=done.nbytes)

    def failure_exception(self) -> None:
        """Raise `TransferFailed` with the reason, and release the room, because SGLang makes no call after this."""
        try:
            self.leg.raise_failure()
        finally:
            self._release("the prefill side ended the request")

    @supervised
    def abort(self) -> None:
        """Abort and release the room; `poll` returns `Failed` from now on. A successful room is only released."""
        if self.leg.status is not KVPoll.Success:
            self.leg.detail = self.leg.detail or ABORTED
        self._release(ABORTED)

    @supervised
    def clear(self) -> None:
        """Clear the room. Idempotent."""
        if self.leg.handle is not None:
            self.leg.handle.clear()

    def _release(self, detail: str) -> None:
        if self.leg.handle is not None:
            self.leg.handle.abort_and_linger(detail)

    @supervised
    def _send_after(self, event: Any, send: partial[None]) -> None:
        """Wait for the device, then send. Runs in the manager's background thread."""
        try:
            if event is not None:
                event.synchronize()
        except RuntimeError as error:  # torch raises it for every error of a device
            self.leg.fail(f"the device failed before the cached prefix could be sent: {error}")
        else:
            self.leg.attempt(send)

"""The prefill side of one request: SGLang's `BaseKVSender` over a `KVSender`.

SGLang sends chunks of pages, and a room counts tokens. The sender therefore keeps a position in tokens. It starts after
the prefix that the decode side already has, and each chunk advances it by the chunk's number of tokens.
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
    """The sender of one request. SGLang's scheduler creates it and calls it, in one thread. No call waits.

    On three paths SGLang calls `abort` and after that neither `poll` nor `clear`. Therefore an aborted room is cleared
    by the library, once the decode side has received the reason, or after `bootstrap_s`.
    """

    # False makes SGLang pass page numbers that are ready to be read on the host. Otherwise their copy from the device
    # may still be in flight, and this sender would have to wait for SGLang's CUDA event.
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
        self._early_send_wait_event: Any = None  # SGLang sets this attribute before it sends a cached prefix
        self._delayed: Future[None] | None = None
        self._row = -1
        self._position = 0

    @supervised
    def identify(self, request: Any, queue: Any) -> None:
        """State the identity of the request, SGLang's `Req` in `queue`. The hook calls this once, before any `send`."""
        if (handle := self.leg.handle) is not None:
            self.leg.attempt(lambda: handle.identify(request_identity(request, queue)))

    @supervised
    def pop_decode_prefix_len(self) -> int:
        """Return the number of tokens that SGLang need not send: the decode side's prefix, in whole pages of this side.

        The decode side's pages may be smaller than this side's, and SGLang sends whole pages only. The library does not
        copy the tokens of the first page that the decode side already has.
        """
        page_size = int(self.kv_mgr.kv_args.page_size)
        known = (self.leg.handle.decode_prefix_len if self.leg.handle is not None else None) or 0
        self._position = known - known % page_size
        return self._position

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:  # noqa: ARG002 - SGLang's signature
        """Record the metadata row of this request, `aux_index`."""
        self._row = -1 if aux_index is None else aux_index

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        """Return True for a chunk with pages, and for the last chunk, which carries the metadata even without pages."""
        return num_pages > 0 or last_chunk

    @supervised
    def send(self, kv_indices: Any, state_indices: list[Any] | None = None, num_kv_tokens: int | None = None) -> None:
        """Hand over the next chunk. An error fails the request.

        Args:
            kv_indices: int32[pages], the page numbers of tokens [position, position + num_kv_tokens).
            state_indices: For the last chunk a list, which is empty because models with states are refused at the
                start. None for every other chunk.
            num_kv_tokens: The number of tokens in the chunk; None if its pages are full.
        """
        if self.leg.handle is None or self.leg.status is KVPoll.Failed:
            return
        tokens = len(kv_indices) * int(self.kv_mgr.kv_args.page_size) if num_kv_tokens is None else num_kv_tokens
        start, self._position = self._position, self._position + tokens
        last = state_indices is not None
        aux = b""
        if last:
            # Read the row now, because SGLang reuses it as soon as the request has ended on this side.
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
            # The device may still be writing the pages. The background thread waits for it, so that the scheduler need
            # not. Later chunks take the same way, so that all chunks stay in order.
            self._delayed = self.kv_mgr.in_background(partial(self._send_after, event, send))

    @supervised
    def poll(self) -> KVPoll:
        """Return the status of the room, which is `Bootstrapping` until the decode side has offered pages."""
        return self.leg.status

    def poll_pp_consensus(self) -> KVPoll:
        """Return the lowest status of all pipeline stages. There is one stage: pipeline parallelism is refused."""
        return self.poll()

    def get_transfer_metric(self) -> KVTransferMetric:
        """Return the seconds and bytes of a successful hand-off, also after `clear`, when SGLang calls this."""
        if self.leg.handle is None or self.leg.status is not KVPoll.Success:
            return KVTransferMetric()
        done = self.leg.handle.wait(0)
        return KVTransferMetric(transfer_latency_s=done.latency_s, transfer_total_bytes=done.nbytes)

    def failure_exception(self) -> None:
        """Raise `TransferFailed` with the reason, and end the room, because SGLang does not call `clear` after this."""
        try:
            self.leg.raise_failure()
        finally:
            self._abort_and_linger("the prefill side ended the request")

    @supervised
    def abort(self) -> None:
        """Abort the room, or clear it if it has succeeded. The status `Success` is kept, any other becomes `Failed`."""
        if self.leg.status is not KVPoll.Success:
            self.leg.detail = self.leg.detail or ABORTED
        self._abort_and_linger(ABORTED)

    @supervised
    def clear(self) -> None:
        """Clear the room. Idempotent."""
        if self.leg.handle is not None:
            self.leg.handle.clear()

    def _abort_and_linger(self, detail: str) -> None:
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

"""The decode side of one request: SGLang's `BaseKVReceiver` over a `KVReceiver`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import BaseKVReceiver, KVTransferDestination

from kvroom import KVPoll, KVReceiver, decode_aux
from kvroom.errors import KVRoomError, RemoteProtocolError

from .identity import request_identity
from .leg import ABORTED, Leg, supervised

if TYPE_CHECKING:
    from .manager import KVRoomKVManager


class KVRoomKVReceiver(BaseKVReceiver):
    """The receiver of one request. SGLang's scheduler creates it and calls it, in one thread. No call waits.

    The pages of a failed request are held until the room has released them: `ensure_abort_notified` registers the
    receiver with the manager, and SGLang then calls the manager's `is_abort_release_safe` in every turn.
    """

    require_staging = False
    supports_host_destination = False
    bootstrap_infos = (None,)
    """SGLang waits for as many acknowledgements as this has entries. One is enough: the room's own proof of the
    drain."""

    def __init__(self, mgr: KVRoomKVManager, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        self.kv_mgr = mgr
        self.bootstrap_addr = bootstrap_addr
        self.bootstrap_room = bootstrap_room
        self.abort_notified = False
        self.leg: Leg[KVReceiver] = Leg(bootstrap_room, partial(mgr.manager.receiver, bootstrap_addr))
        self._ready = False
        self._offered = False
        self._landed = False
        self._row = -1
        self._tokens: int | None = None

    @property
    def released(self) -> bool:
        """True if no writer can touch the pages of this request any longer."""
        return not self._offered or self.leg.handle is None or self.leg.handle.released

    @property
    def conclude_state(self) -> KVPoll | None:
        """The final status, or None while the hand-off is in flight."""
        status = self.poll()
        return status if status in (KVPoll.Success, KVPoll.Failed) else None

    def init(self, prefill_dp_rank: int) -> None:  # noqa: ARG002 - SGLang's signature; the room finds its prefill rank
        """Let `poll` return `WaitingForInput` from now on: SGLang has found the prefill server in its table."""
        self._ready = True

    @supervised
    def identify(self, request: Any, queue: Any) -> None:
        """State the identity of the request, SGLang's `Req` in `queue`. The hook calls this once, before the offer."""
        self._tokens = len(request.origin_input_ids)
        if (handle := self.leg.handle) is not None:
            self.leg.attempt(lambda: handle.identify(request_identity(request, queue)))

    @supervised
    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,  # noqa: ARG002 - SGLang's signature
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
    ) -> None:
        """Offer pages for tokens [decode_prefix_len, length of the prompt).

        From now on peers may write into the pages, until the room succeeds or `released` is True.

        Args:
            kv_indices: int32[pages], the page numbers; the first page holds token `decode_prefix_len`.
            aux_index: This request's metadata row, into which `poll` writes before it returns `Success`.
            state_indices: Empty, because models with states are refused at the start.
            decode_prefix_len: The number of tokens that the decode side has in its prefix cache; None stands for 0.
            destination: Only `DEVICE` is supported. Any other value fails the request.
        """
        handle = self.leg.handle
        if handle is None or self.leg.status is KVPoll.Failed:
            return
        if destination != KVTransferDestination.DEVICE:
            self.leg.fail("SGLang asked for pages in host memory, which kvroom does not support")
            return
        if self._tokens is None:
            self.leg.fail("the length of the prompt is unknown: SGLang did not call kvroom's hook for the offer")
            return
        self._row = -1 if aux_index is None else aux_index
        offer = partial(
            handle.send_metadata, kv_indices.tolist(), tokens=self._tokens, decode_prefix_len=decode_prefix_len or 0
        )
        self._offered = self.leg.attempt(offer)

    @supervised
    def poll(self) -> KVPoll:
        """Return a status that the SGLang queue which holds the request can handle.

        Before the offer, in the queue of requests without pages, that is `Failed`, `Bootstrapping` or
        `WaitingForInput`. After the offer, it is `Success` only once the metadata row of this request is written.
        """
        status = self.leg.status
        if status is KVPoll.Failed:
            return status
        if not self._offered:
            return status if self._ready and status is KVPoll.WaitingForInput else KVPoll.Bootstrapping
        if status is not KVPoll.Success or self._landed:
            return status
        # Write the prefill side's metadata into this request's row, or fail the request because it is invalid.
        assert self.leg.handle is not None  # it has succeeded
        try:
            aux = decode_aux(self.leg.handle.aux)
            limit = self.kv_mgr.vocab_size
            if aux.first_token is None:
                raise RemoteProtocolError("the prefill side sent no first token, which SGLang needs to continue")
            if aux.first_token >= limit:
                raise RemoteProtocolError(
                    f"the prefill side sent {aux.first_token} as first token, outside [0, {limit})"
                )
            self.kv_mgr.rows.write(self._row, aux)
        except KVRoomError as error:
            self.leg.fail(str(error))
        else:
            self._landed = True
        return self.leg.status

    def failure_exception(self) -> None:
        """Raise `TransferFailed` with the reason. A room that has not failed itself is aborted first."""
        self.leg.raise_failure()

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:  # noqa: ARG002 - SGLang's signature
        """Hold the pages of this failed request until `released` is True. The room has notified the prefill side."""
        if not self.abort_notified:
            self.abort_notified = True
            self.kv_mgr.hold(self)

    def is_abort_release_safe(self) -> bool:
        """Return `released`. SGLang calls this for pages in host memory, and the manager's method for all others."""
        return self.released

    @supervised
    def abort(self) -> None:
        """Abort the room, which notifies the prefill side. `poll` returns `Failed` from now on."""
        self.leg.fail(ABORTED)

    def refuse(self, reason: str) -> None:
        """Fail the request because it needs something that this adapter does not support."""
        self.leg.fail(reason)

    @supervised
    def clear(self) -> None:
        """Clear the room. Idempotent."""
        if self.leg.handle is not None:
            self.leg.handle.clear()

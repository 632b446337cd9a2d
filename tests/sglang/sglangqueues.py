"""Two schedulers of SGLang without a model, in one process: its own queues, over the real adapter.

In place of a model there is a function that maps each prompt to a row of bytes for each token, which is written to the
slots of the request. SGLang's own methods create the senders and receivers, cut the chunks, offer the pages, take the
metadata rows and release the pages. Only allocators and batches are left out: tests choose the pages of a request.
"""

from __future__ import annotations

import contextlib
import random
from array import array
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helpers import (
    DECODE,
    HOST,
    PATIENCE_S,
    PREFILL,
    ROWS,
    bytes_of,
    configured,
    kv_args,
    new_buffers,
    new_pool,
    new_request,
    new_rows,
    one_rank,
    set_variables,
    values_of,
    wait_until,
)  # fmt: skip

from kvroom.adapters.sglang import chosen
from kvroom.adapters.sglang.leg import TransferFailed
from kvroom.adapters.sglang.manager import KVRoomKVBootstrapServer, KVRoomKVManager
from kvroom.adapters.sglang.sender import KVRoomKVSender
from kvroom.core.phases import KVPoll
from kvroom.transports.memory import Faults, MemoryTransport


class Half:
    """The part that both schedulers share. `options` are the arguments of `new_pool`."""

    mode = ""

    def __init__(self, port: int = 8998, pool: Any = None, buffers: Any = None, **options: Any) -> None:
        self.pool = new_pool(**options) if pool is None else pool
        self.buffers = new_buffers() if buffers is None else buffers
        self.rows = new_rows()
        self.port = port
        with configured(self.mode, port, str(self.pool.device)) as (mode, args):
            self.manager = KVRoomKVManager(kv_args(self.pool, self.buffers), mode, args, False)
        self.page_size = int(self.pool.page_size)
        self._tables: dict[str, list[int]] = {}
        self._free = list(range(1, self.pool.size // self.page_size + 1))
        random.Random(7).shuffle(self._free)

    def table(self, req: Any) -> list[int]:
        """Return the pages for the whole prompt of a request."""
        if req.rid not in self._tables:
            count = -(-len(req.origin_input_ids) // self.page_size)
            assert count <= len(self._free), "the pool of this test is too small"
            self._tables[req.rid], self._free = self._free[:count], self._free[count:]
        return self._tables[req.rid]

    def free_all(self) -> None:
        """Free the pages of all requests."""
        self._free += [page for table in self._tables.values() for page in table]
        self._tables.clear()

    def slots(self, req: Any, start: int, stop: int) -> torch.Tensor:
        """Return the slots of tokens [start, stop)."""
        table = self.table(req)
        at = [table[token // self.page_size] * self.page_size + token % self.page_size for token in range(start, stop)]
        return torch.tensor(at, dtype=torch.int64)

    def compute(self, req: Any, start: int, stop: int) -> None:
        """Write the values that the model computes for tokens [start, stop)."""
        slots = self.slots(req, start, stop)
        for buffer, values in zip(bytes_of(self.pool), values_of(self.pool, req.origin_input_ids), strict=True):
            buffer[slots.to(buffer.device)] = values[start:stop].to(buffer.device)

    def wrong_tokens(self, req: Any) -> list[int]:
        """Return the tokens of which some byte differs from the model's values."""
        slots, wrong = self.slots(req, 0, len(req.origin_input_ids)), set()
        for buffer, values in zip(bytes_of(self.pool), values_of(self.pool, req.origin_input_ids), strict=True):
            there = buffer[slots.to(buffer.device)].cpu()
            wrong |= set(torch.nonzero((there != values).any(dim=1)).flatten().tolist())
        return sorted(wrong)

    def pages(self) -> list[bytes]:
        """Return the bytes of each page, for a comparison."""
        parts = [buffer.view(self.pool.size // self.page_size + 1, -1).numpy() for buffer in bytes_of(self.pool)]
        return [b"".join(part[page].tobytes() for part in parts) for page in range(parts[0].shape[0])]

    @property
    def faults(self) -> Faults:
        """The faults that a test can inject into the writes of this side, where the transport is `memory`."""
        transport = self.manager.manager.transport
        assert isinstance(transport, MemoryTransport)
        return transport.faults

    def leftovers(self) -> dict[str, int]:
        """Return everything that is kept of any request; empty if nothing is kept."""
        audit = self.manager.manager.audit()
        kept = {name: getattr(audit, name) for name in audit.__struct_fields__} | self.manager.counts()
        kept["rows"] = ROWS - self.rows.available_size()
        return {name: count for name, count in kept.items() if count}

    def wait_idle(self) -> None:
        """Wait until no room is left."""
        assert self.manager.manager.wait_idle(PATIENCE_S), self.manager.manager.rooms()

    def close(self) -> None:
        self.manager.close()


class Prefill(Half):
    """The prefill scheduler's part of a request: bootstrap queue, chunks, in-flight queue."""

    mode = "prefill"

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__(port, **options)
        self.queue = object.__new__(PREFILL.PrefillBootstrapQueue)
        self.queue.kv_manager, self.queue.bootstrap_port = self.manager, port
        self.queue.transfer_backend, self.queue.max_input_len = None, 1 << 20
        self.queue.req_to_metadata_buffer_idx_allocator = self.rows
        allocator = SimpleNamespace(page_size=self.page_size, translate_kv_indices_for_transfer=lambda slots: slots)
        self.queue.scheduler = SimpleNamespace(token_to_kv_pool_allocator=allocator)
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=allocator, enable_staging=False, disagg_metadata_buffers=self.buffers,
            disagg_prefill_bootstrap_queue=self.queue, disagg_prefill_pending_chunk_rids=set(),
        )  # fmt: skip

    def begin(self, req: Any) -> KVRoomKVSender:
        """Take in a request, for which SGLang creates a sender."""
        assert self.queue.create_sender(req, 2)
        sender: KVRoomKVSender = req.disagg_kv_sender
        return sender

    def bootstrapped(self, req: Any) -> bool:
        """Poll the request as the bootstrap queue does. Any other status would end the scheduler."""
        status = req.disagg_kv_sender.poll()
        assert status in (KVPoll.Failed, KVPoll.Bootstrapping, KVPoll.WaitingForInput), status
        assert status is not KVPoll.Failed, failure(req.disagg_kv_sender)
        return status is KVPoll.WaitingForInput

    def ready(self, req: Any) -> int:
        """Wait for the decode side's offer and prepare the sender. Return the first token that SGLang sends."""
        wait_until(lambda: self.bootstrapped(req), "the offer of the decode side")
        assert self.queue.finalize_bootstrap(req)
        return int(req.start_send_idx)

    def send(self, req: Any, stop: int | None = None, first_token: int = 11, cached: int = 0) -> None:
        """Compute the prompt up to `stop` and send it as SGLang does. If `stop` is None, this is the last chunk."""
        end = len(req.origin_input_ids) if stop is None else stop
        self.compute(req, 0, end)
        req.extend_end, req.kv = end, SimpleNamespace(req_pool_idx=0)
        table = torch.zeros((1, len(req.origin_input_ids)), dtype=torch.int32)
        table[0, :end] = self.slots(req, 0, end)
        self.scheduler.req_to_token_pool = SimpleNamespace(req_to_token=table)
        if stop is None:
            req.output_ids, req.cached_tokens = array("q", [first_token]), cached
        PREFILL.SchedulerDisaggregationPrefillMixin._send_kv_chunk(self.scheduler, req, last_chunk=stop is None)

    def sent(self, req: Any) -> bool:
        """Poll the request as the in-flight queue does."""
        status = req.disagg_kv_sender.poll()
        assert status in (KVPoll.Failed, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success), status
        assert status is not KVPoll.Failed, failure(req.disagg_kv_sender)
        return status is KVPoll.Success

    def finish(self, req: Any) -> Any:
        """Wait for success and end the request. Return SGLang's metric of the transfer."""
        wait_until(lambda: self.sent(req), "the success of the sender")
        req.disagg_kv_sender.clear()
        metric = req.disagg_kv_sender.get_transfer_metric()
        self.rows.free(req.metadata_buffer_index)
        return metric

    def give_up(self, req: Any) -> TransferFailed:
        """End a failed request as SGLang does. Return the exception of its sender."""
        error = failure(req.disagg_kv_sender)
        if req.metadata_buffer_index >= 0:
            self.rows.free(req.metadata_buffer_index)
        return error

    def run(self, req: Any, *stops: int, first_token: int = 11, cached: int = 0) -> Any:
        """Serve a request to its end, in chunks up to each of `stops` and the last one. Return SGLang's metric."""
        if req.disagg_kv_sender is None:
            self.begin(req)
        self.ready(req)
        for stop in stops:
            self.send(req, stop)
        self.send(req, first_token=first_token, cached=cached)
        return self.finish(req)


class Decode(Half):
    """The decode scheduler's part of a request, with SGLang's two queues."""

    mode = "decode"

    def __init__(self, port: int, **options: Any) -> None:
        super().__init__(port, **options)
        self.ended: list[Any] = []
        self.tree = SimpleNamespace(released=[], unlock=lambda _: None)
        self.scheduler = SimpleNamespace(
            enable_decode_hicache=False, enable_hisparse=False, kv_checksum_computer=None,
            spec_algorithm=SimpleNamespace(is_none=lambda: True), disagg_decode_prealloc_queue=None,
            metrics_reporter=SimpleNamespace(enable_metrics=False),
            output_streamer=SimpleNamespace(stream_output=lambda requests, _: self.ended.extend(requests)),
            batch_result_processor=SimpleNamespace(_maybe_update_reasoning_tokens=lambda *_: None),
        )  # fmt: skip
        with one_rank() as group:
            self.transfers = DECODE.DecodeTransferQueue(self.rows, self.buffers, self.scheduler, self.tree)
        self.queue = object.__new__(DECODE.DecodePreallocQueue)
        self.queue.queue, self.queue.pp_size, self.queue.tp_rank = [], 1, 0
        self.queue.gloo_group, self.queue.scheduler = group, self.scheduler
        self.queue.kv_manager, self.queue.transfer_queue = self.manager, self.transfers
        self.queue.transfer_backend, self.queue._num_published_destinations = None, 0
        self.queue.req_to_metadata_buffer_idx_allocator = self.rows

    def begin(self, req: Any) -> Any:
        """Take in a request, for which SGLang creates a receiver. Return its `DecodeRequest`."""
        one = self.queue._create_receiver_and_enqueue(req)
        self.queue._init_receiver(one, 0)
        return one

    def turn(self) -> None:
        """Poll all requests as both queues do in every turn of the scheduler's loop."""
        self.queue._update_handshake_waiters()
        for one in [one for one in self.queue.queue if one.req.finished_reason is not None]:
            self.queue.queue.remove(one)
            one.kv_receiver.clear()
        self.transfers.pop_transferred()
        self.transfers.resolve_deferred_releases()

    def linked(self, one: Any) -> bool:
        """Take a turn. Return True if SGLang would now allocate pages for the request."""
        self.turn()
        assert one.req.finished_reason is None, one.req.finished_reason.message
        return bool(one.waiting_for_input)

    def offer(self, one: Any, prefix: int = 0) -> None:
        """Wait for the links. Then offer pages for the tokens from `prefix` on, as SGLang does."""
        wait_until(lambda: self.linked(one), "the links to the prefill side")
        self.compute(one.req, 0, prefix)
        slots = self.slots(one.req, prefix, len(one.req.origin_input_ids))
        self.queue.queue.remove(one)
        self.queue._send_kv_metadata(one, slots, self.page_size, state_indices=[], decode_prefix_len=prefix)
        self.transfers.add(one)

    def done(self, one: Any) -> bool:
        """Take a turn. Return True if SGLang has taken over the request."""
        self.turn()
        assert one.req.finished_reason is None, one.req.finished_reason.message
        return one not in self.transfers.queue

    def finish(self, one: Any) -> int:
        """Wait until SGLang has taken over the request and return its first token."""
        wait_until(lambda: self.done(one), "the success of the receiver")
        return int(one.req.output_ids[0])

    def released(self, req: Any) -> bool:
        """Take a turn. Return True if SGLang has freed the pages of the request."""
        self.turn()
        return req in self.tree.released

    def wait_released(self, req: Any) -> None:
        """Wait until SGLang has freed the pages of the request."""
        wait_until(lambda: self.released(req), "the release of the pages")

    def failed(self, one: Any) -> str:
        """Wait until SGLang has failed the request. Return the message to its client."""

        def has_failed() -> bool:
            self.turn()
            return one.req.finished_reason is not None

        wait_until(has_failed, "the failure of the receiver")
        return str(one.req.finished_reason.message)


def failure(side: Any) -> TransferFailed:
    """Return the exception that `failure_exception` raises. It must raise one."""
    try:
        side.failure_exception()
    except TransferFailed as error:
        return error
    raise AssertionError("failure_exception has not raised")


class Pair:
    """A prefill and a decode scheduler with one directory, until its `with` block ends.

    Args:
        settings: The adapter's variables without their prefix. The default transport is `memory`.
        options: Arguments of `Half` for both sides. The prefix `prefill_` or `decode_` in a name, as in
            `decode_page_size`, restricts an option to one side.
    """

    def __init__(self, settings: Mapping[str, object] | None = None, **options: Any) -> None:
        self._settings = settings or {}
        self._options = options
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Pair:
        with contextlib.ExitStack() as parts:
            patch = parts.enter_context(pytest.MonkeyPatch.context())
            set_variables(patch, **self._settings)
            use_backend(patch)
            directory = KVRoomKVBootstrapServer(HOST, 0)
            parts.callback(directory.close)
            self.address = directory._server.address
            self.port = int(self.address.rpartition(":")[2])
            self.prefill = Prefill(self.port, **self._of("prefill"))
            parts.callback(self.prefill.close)
            self.decode = Decode(self.port, **self._of("decode"))
            parts.callback(self.decode.close)
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _of(self, side: str) -> dict[str, Any]:
        own = {
            name.removeprefix(f"{side}_"): value for name, value in self._options.items() if name.startswith(f"{side}_")
        }
        both = {name: value for name, value in self._options.items() if not name.startswith(("prefill_", "decode_"))}
        return both | own

    def requests(self, prompt: Sequence[int], room: Any = None, **options: Any) -> tuple[Any, Any]:
        """Return both sides' requests for one prompt and one room."""
        first = new_request(prompt, room, self.port, **options)
        return first, new_request(prompt, first.bootstrap_room, self.port, **options)

    def hand_over(self, prompt: Sequence[int], *stops: int, prefix: int = 0, room: Any = None) -> tuple[Any, Any]:
        """Serve one prompt to its end and check it. Return both requests."""
        source, sink = self.requests(prompt, room)
        self.prefill.begin(source)
        one = self.decode.begin(sink)
        self.decode.offer(one, prefix)
        self.prefill.run(source, *stops)
        assert self.decode.finish(one) == 11
        assert self.decode.wrong_tokens(sink) == []
        return source, sink

    def prefill_fails(self, req: Any) -> TransferFailed:
        """Wait until the sender has failed, and end the request. Return the exception of the sender."""
        wait_until(lambda: req.disagg_kv_sender.poll() is KVPoll.Failed, "the failure of the sender")
        return self.prefill.give_up(req)

    def wait_idle(self) -> None:
        """Wait until neither side keeps anything. A room that one side has refused is kept for some seconds."""
        # The decode side's last message may reach the prefill side after that was idle, so the decode side is first.
        self.decode.wait_idle()
        self.prefill.wait_idle()
        wait_until(lambda: not (self.prefill.leftovers() or self.decode.leftovers()), "nothing to be left")


def use_backend(patch: pytest.MonkeyPatch) -> None:
    """Make SGLang's queues use the adapter's classes, and record the requests that they release in their tree cache."""
    for module in (PREFILL, DECODE):
        patch.setattr(module, "get_kv_class", lambda backend, kind: chosen.classes()[kind.value])
    patch.setattr(DECODE, "release_kv_cache", lambda req, tree, checkpoint: tree.released.append(req))

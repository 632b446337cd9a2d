"""`KVRoomConnector`: vLLM's hooks, each forwarded to the scheduler's or the worker's side of the connector.

vLLM creates one object in its scheduler's process and one in each worker's, and an exception that leaves a hook ends
the engine. Every hook after the start is therefore guarded: an exception is logged, and the hook returns the value that
means "nothing to report". An error during the start is raised, because an engine that cannot hand over must not start.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from . import layout, logs, start
from .blocks import BlockTables
from .guard import optional
from .orders import DirectoryAddress, Failures, Orders
from .scheduler import SchedulerSide
from .settings import VLLMSettings
from .stats import KVRoomPromMetrics, KVRoomStats
from .worker import StepReport

if TYPE_CHECKING:
    import torch

log = logging.getLogger("vllm." + __name__)
Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(otherwise: Callable[[], object]) -> Callable[[Hook], Hook]:
    """Return a decorator that logs an exception of a hook and returns `otherwise()` in its place."""

    def wrap(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> object:
            try:
                return hook(*args, **kwargs)
            except Exception:  # a supervisor: an exception that leaves a hook ends vLLM's engine
                log.exception("internal error in the connector's %s; the engine continues", hook.__name__)
                return otherwise()

        return cast("Hook", call)

    return wrap


def _none() -> None:
    return None


class KVRoomConnector(KVConnectorBase_V1, SupportsHMA):
    """A vLLM connector that hands prompts from a producer to a consumer through rooms. See `docs/vllm.md`."""

    # The label of loaded tokens in vLLM's metric of cached prompt tokens. Other versions of vLLM have no such labels.
    if (_sources := optional("vllm.v1.metrics.cache_hit_source", "CacheHitSource")) is not None:
        _cache_hit_source = getattr(_sources, "P2P")  # noqa: B009 - vLLM's classes are Any to mypy

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raise `ConfigurationError` for invalid settings and for caches that cannot be handed over."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = VLLMSettings.of(transfer.kv_connector_extra_config)
        self._produces, self._consumes = transfer.is_kv_producer, transfer.is_kv_consumer
        if self._consumes:
            self._settings.check_consumer()
        self._tables = BlockTables(kv_cache_config)
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        self._worker: start.ConnectorParts | None = None
        self._report = StepReport()
        self._scheduler: SchedulerSide | None = None
        logs.use_vllm_handlers()
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                self._tables,
                produces=self._produces,
                consumes=self._consumes,
                engine_id=transfer.engine_id,
            )

    # -- the scheduler's side ------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], DirectoryAddress]) -> None:
        """Record the address of this engine's directory, from the worker that serves it."""
        for address in metadata.values():
            if self._scheduler is not None and address.bootstrap_addr is not None:
                self._scheduler.bootstrap_addr = address.bootstrap_addr

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:  # noqa: ARG002 - vLLM's hook
        """Return the groups that are handed over, whose new blocks need no zeroing."""
        groups: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return groups

    @guarded(_none)
    def on_new_request(self, request: Any) -> None:
        """See `SchedulerSide.new_request`."""
        self._side.new_request(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See `SchedulerSide.matched`. Loads are asynchronous: the request waits while the engine continues."""
        tokens = self._side.matched(request, num_computed_tokens)
        return tokens, tokens > 0

    @guarded(_none)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See `SchedulerSide.allocated`."""
        self._side.allocated(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(Orders)
    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        """See `SchedulerSide.orders`."""
        return self._side.orders(scheduler_output)

    @guarded(_none)
    def update_connector_output(self, connector_output: Any) -> None:
        """See `SchedulerSide.reported`."""
        self._side.reported(connector_output)

    @guarded(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerSide.finished`."""
        return self._side.finished(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerSide.finished`."""
        return self._side.finished(request, block_ids)

    # -- the worker's side ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Describe the pool and open the manager over it; the first rank of a producer also starts the directory."""
        pool = layout.describe(self._vllm_config, self._kv_cache_config, kv_caches)
        self._worker = start.start_worker(self._vllm_config, self._settings, pool, produces=self._produces)

    def get_handshake_metadata(self) -> DirectoryAddress | None:
        """Return the address of this rank's directory, if it serves one."""
        return None if self._worker is None else DirectoryAddress(self._worker.bootstrap_addr)

    @guarded(_none)
    def handle_preemptions(self, kv_connector_metadata: Orders) -> None:
        """End the rooms that were sent some of the preempted blocks, before vLLM overwrites these."""
        if self._worker is not None:
            self._worker.side.preempt(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Orders) -> None:
        """Carry out the orders that precede the forward pass."""
        super().bind_connector_metadata(connector_metadata)
        self._begin(connector_metadata)

    @guarded(_none)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002 - vLLM's hook
        """Offer the blocks of new loads, which may be written from now on."""
        if self._worker is not None:
            self._worker.side.load(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request is scheduled only when all of its layers are loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: blocks are sent with all of their layers after the forward pass."""

    @guarded(_none)
    def wait_for_save(self) -> None:
        """Send the blocks of the forward pass, which has ended or is still running on the device."""
        if self._worker is not None:
            orders = self._orders()
            if orders.sends:
                self._worker.synchronize()
            self._worker.side.send(orders)

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002 - orders carry it
        """Return the requests whose rooms have ended.

        With one KV cache group, failures are reported by block (see below), with several by request.
        """
        if self._worker is None:
            return KVConnectorTransferResults()
        self._report = report = self._worker.side.report(idle=self._orders().idle)
        failed = report.blockless if self._one_group else set(report.failed)
        return KVConnectorTransferResults(report.sent, report.received, failed)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of failed loads.

        vLLM ends or recomputes their requests now, and frees the blocks once the requests are reported.
        """
        return self._report.blocks if self._one_group else set()

    @guarded(_none)
    def build_connector_worker_meta(self) -> Failures | None:
        """Return the reasons of this step's failed loads, for the scheduler's side."""
        return Failures(dict(self._report.failed)) if self._report.failed else None

    @guarded(_none)
    def get_kv_connector_stats(self) -> KVRoomStats | None:
        """Return the counts since the last report, or None; see `StatsTaker.take`."""
        return None if self._worker is None else self._worker.stats()

    @guarded(_none)
    def shutdown(self) -> None:
        """End every room and notify the peers."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    # -- for vLLM's API server -----------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVRoomStats | None:
        """Return the counts of a worker as received from its process."""
        return KVRoomStats(data=data) if data is not None else KVRoomStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVRoomPromMetrics:
        """Return the metrics for vLLM's `/metrics`."""
        return KVRoomPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduler is not None  # vLLM calls these hooks in the scheduler's process only
        return self._scheduler

    def _orders(self) -> Orders:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)  # `build_connector_meta` has created it
        return orders

    @guarded(_none)
    def _begin(self, orders: Orders) -> None:
        if self._worker is not None:
            self._worker.side.begin(orders)

"""Two engines without a model: vLLM's real schedulers and the real connector, over memory that a test can read.

In place of a model there is a function that maps each prefix to a number, which is written to the token's place in
vLLM's block table. Before each step, every token that an engine considers computed is read and compared. Therefore a
block that was lost, reused too early or written too late is found in the step that would have used it. Time is real,
and a step takes a millisecond.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvroom import KVBootstrapServer, KVGroup, KVLayout, KVManager, Timeouts
from kvroom.adapters.vllm import KVRoomConnector
from kvroom.adapters.vllm.blocks import BlockTables
from kvroom.adapters.vllm.start import ConnectorParts
from kvroom.adapters.vllm.worker import WorkerSide
from kvroom.plan.layout import array_regions
from kvroom.transports.memory import Faults, MemoryTransport

BLOCK = 16
LAYERS = 2
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
_numbers = itertools.count()


@dataclass
class Ended:
    """The end of a request in vLLM: its reason, and the parameters of the reply."""

    reason: str
    tokens: int
    params: Any


@dataclass
class Mistakes:
    """The reads of tokens that are not the request's own, collected because a step must not be interrupted."""

    found: list[str] = field(default_factory=list)


class Engine:
    """One engine. `blocks` is the size of its pool with the null block, `policy` vLLM's `kv_load_failure_policy`.

    With `window`, the second layer attends to that number of tokens, which makes it a KV cache group with its own
    blocks.
    """

    def __init__(
        self, role: str, model: Path, *, blocks: int = 40, policy: str = "fail", transport: str = "tcp",
        timeouts: Timeouts | None = None, batched_tokens: int = 48, sequences: int = 4, checksum: bool = False,
        window: int = 0,
    ) -> None:  # fmt: skip
        self.role = role
        self.config = _config(role, model, policy, blocks, batched_tokens, sequences)
        self.window = window
        pool = KVCacheConfig(blocks, [], _groups(window))
        self.config.cache_config.num_gpu_blocks = blocks
        self.scheduler = Scheduler(self.config, pool, StructuredOutputManager(self.config), block_size=BLOCK)
        self.memory = np.zeros((LAYERS, blocks, BLOCK), np.uint64)
        self.ended: dict[str, Ended] = {}
        self.mistakes = Mistakes()
        self.preempted: set[str] = set()  # the requests that vLLM has preempted at some time
        self._parts = contextlib.ExitStack()
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._produced: dict[str, int] = {}
        self.directory = ""
        if role != "decode":
            server = KVBootstrapServer()
            self.directory = server.start()
            self._parts.callback(server.close)
            self.scheduler.connector._scheduler.bootstrap_addr = self.directory
        self.side = WorkerSide(lambda wake: self._manager(wake, transport, timeouts, checksum), idle_wait_s=0.02)
        self._parts.callback(self.side.close)
        self.connector = KVRoomConnector(self.config, KVConnectorRole.WORKER, pool)
        self.connector._worker = ConnectorParts(self.side, "cpu", self.directory or None, contextlib.ExitStack())

    @property
    def tables(self) -> BlockTables:
        """The block tables of the connector's scheduler side."""
        tables: BlockTables = self.scheduler.connector._scheduler.tables
        return tables

    @property
    def manager(self) -> KVManager:
        return self.side.manager

    def close(self) -> None:
        self._parts.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, prompt: list[int], params: Mapping[str, Any] | None, *, max_tokens: int = 1, **sampled: Any) -> str:
        """Add a request, with further sampling parameters if given. Return its id."""
        name = f"{self.role}-{next(_numbers)}"
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampled)
        sampling.extra_args = {"kv_transfer_params": dict(params)} if params else None
        request = Request(name, list(prompt), sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        self._produced[name] = 0
        return name

    def abort(self, name: str) -> None:
        """Abort a request, as vLLM does when the client leaves."""
        from vllm.v1.request import RequestStatus

        for request in self.scheduler.finish_requests({name}, RequestStatus.FINISHED_ABORTED):
            self._end(request.request_id, "abort", None)

    def preempt(self) -> None:
        """Preempt all running requests, which frees their blocks."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    @property
    def at(self) -> dict[str, Any]:
        """Return the `kv_transfer_params` that name this engine's directory."""
        host, port = self.directory.split(":")
        return {"bootstrap_host": host, "bootstrap_port": int(port)}

    @property
    def held_blocks(self) -> int:
        """The number of blocks that requests hold."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    @property
    def faults(self) -> Faults:
        """The faults that the transport `memory` can inject into writes."""
        transport = self.manager.transport
        assert isinstance(transport, MemoryTransport)
        return transport.faults

    @property
    def busy(self) -> bool:
        """True if vLLM's engine would take a further step."""
        return bool(self.scheduler.has_requests())

    def step(self) -> None:
        """Take one step: all that vLLM's engine core, executor and model runner do in it, in the same order."""
        output = self.scheduler.schedule()
        self.preempted |= set(output.preempted_req_ids or ())
        orders, connector = output.kv_connector_metadata, self.connector
        connector.handle_preemptions(orders)
        connector.bind_connector_metadata(orders)
        sampled = self._forward(output)
        said = KVConnectorOutput()
        connector.start_load_kv(None)
        connector.wait_for_save()
        results = connector.get_transfer_results(output.finished_req_ids)
        said.finished_sending, said.finished_recving = results.finished_sending, results.finished_recving
        said.failed_recving = results.failed_recving
        said.invalid_block_ids = connector.get_block_ids_with_load_errors()
        said.kv_connector_worker_meta = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        runner = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names], kv_connector_output=said,
        )  # fmt: skip
        for outputs in self.scheduler.update_from_output(output, runner).values():
            for one in outputs.outputs:
                self._produced[one.request_id] += len(one.new_token_ids)
                if one.finish_reason is not None:
                    self._end(one.request_id, str(one.finish_reason), one.kv_transfer_params)

    # -- what must be true ---------------------------------------------------------------------------------------------

    def leftovers(self) -> dict[str, Any]:
        """Return everything that is kept of requests and rooms; empty if nothing is kept."""
        audit = self.manager.audit()
        kept = {
            **self.side.counts(),
            "scheduler's tickets": len(self.scheduler.connector._scheduler._tickets),
            "vLLM's requests": len(self.scheduler.requests),
            "blocks held": self.held_blocks,
            **{name: getattr(audit, name) for name in audit.__struct_fields__},
        }  # fmt: skip
        kept.pop("tickets")  # counted in the last step, which may have been before the last request ended
        return {name: value for name, value in kept.items() if value}

    # -- the model -----------------------------------------------------------------------------------------------------

    def _forward(self, output: Any) -> dict[str, list[int]]:
        sampled: dict[str, list[int]] = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            begin = request.num_computed_tokens - count  # the scheduler has already added `count`
            tokens, tables = list(request.all_token_ids), self.scheduler.kv_cache_manager.get_block_ids(name)
            values = prefix_values(tokens[: begin + count])
            for layer in range(LAYERS):
                table = tables[min(layer, len(tables) - 1)]
                oldest = max(0, begin + 1 - self.window) if self.window and layer else 0
                self._read(name, layer, table, values, range(oldest, begin))
                for position in range(begin, begin + count):
                    self.memory[layer, table[position // BLOCK], position % BLOCK] = values[position] + layer
            done = begin + count >= len(tokens)
            sampled[name] = [int(values[-1]) % 1000] if done else []
        return sampled

    def _read(self, name: str, layer: int, table: list[int], values: list[int], positions: range) -> None:
        for position in positions:
            block, slot = table[position // BLOCK], position % BLOCK
            if int(self.memory[layer, block, slot]) != values[position] + layer:
                self.mistakes.found.append(f"{name}: token {position} of layer {layer} in block {block} is wrong")
                return

    def _end(self, name: str, reason: str, params: Mapping[str, Any] | None) -> None:
        if name in self.ended:
            self.mistakes.found.append(f"{name} ended twice: {self.ended[name].reason}, then {reason}")
        self.ended[name] = Ended(reason, self._produced[name], params)

    def _manager(
        self, wake: Callable[[], None], transport: str, timeouts: Timeouts | None, checksum: bool
    ) -> KVManager:
        groups = self.tables.groups
        regions = [
            region
            for layer in range(LAYERS)
            for region in array_regions(
                self.memory[layer].ctypes.data, (*self.memory[layer].shape, 8), (*self.memory[layer].strides, 1), "PTD",
                itemsize=1, layers=(layer,), components=("kv",), group=groups[min(layer, len(groups) - 1)].name,
            )
        ]  # fmt: skip
        more = tuple(KVGroup(name=group.name, window=group.window) for group in groups if group.name)
        return KVManager(
            KVLayout(tuple(regions), "uint64", groups=more), transport=transport, register_with=self.directory or None,
            timeouts=timeouts, on_change=wake, checksum=checksum,
        )  # fmt: skip


def _groups(window: int) -> list[Any]:
    """Return vLLM's KV cache groups: one, or one for each layer if the second has a window."""
    layers = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
    size: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 4, "dtype": torch.float32}
    if not window:
        return [KVCacheGroupSpec(layers, FullAttentionSpec(**size))]
    sliding = SlidingWindowSpec(**size, sliding_window=window)
    return [KVCacheGroupSpec(layers[:1], FullAttentionSpec(**size)), KVCacheGroupSpec(layers[1:], sliding)]


def prefix_values(tokens: list[int]) -> list[int]:
    """Return for each token a number below 2**63 that depends on it and on all tokens before it."""
    state, values = xxhash.xxh3_64(), []
    for token in tokens:
        state.update(token.to_bytes(8, "little"))
        values.append(state.intdigest() >> 1)
    return values


def run(engines: list[Engine], until: Callable[[], bool], within_s: float = 30) -> None:
    """Step the busy engines in turn until the condition holds. Raise an AssertionError after the time."""
    end = time.monotonic() + within_s
    while not until():
        assert time.monotonic() < end, {engine.role: engine.leftovers() for engine in engines}
        for engine in engines:
            if engine.busy:
                engine.step()


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(1, 900) for _ in range(tokens)]


def _config(role: str, model: Path, policy: str, blocks: int, batched_tokens: int, sequences: int) -> VllmConfig:
    init_none_hash(sha256)
    transfer = KVTransferConfig(
        kv_connector="KVRoomConnector", kv_connector_module_path="kvroom.adapters.vllm", kv_role=ROLES[role],
        kv_load_failure_policy=policy, kv_connector_extra_config={"bootstrap_port": 0},
    )  # fmt: skip
    return VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="bfloat16", max_model_len=512, seed=0),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=sequences, max_num_batched_tokens=batched_tokens, max_model_len=512,
            enable_chunked_prefill=True, is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer,
    )  # fmt: skip

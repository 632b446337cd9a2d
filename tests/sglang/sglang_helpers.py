"""SGLang's own pools, rows, requests and options, in this process and on the CPU, without a server or a model.

The tests import SGLang through this module, which ignores the warnings of SGLang's own imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import threading
import time
import traceback
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():  # in the tests, warnings are errors, but those of SGLang's imports are not kvroom's
    warnings.simplefilter("ignore")
    import sglang.srt.disaggregation.decode as sglang_decode
    import sglang.srt.disaggregation.prefill as sglang_prefill
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.disaggregation.utils import (
        FAKE_BOOTSTRAP_HOST,
        DisaggregationMode,
        MetadataBuffers,
        ReqToMetadataIdxAllocator,
        setup_state_kv_args,
    )
    from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.runtime_context import get_context, get_device, get_disagg, get_parallel
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs

    # The module of the HTTP process has installed uvloop, which a scheduler's process, as this one is, does not have.
    asyncio.set_event_loop_policy(None)

from kvroom.engine.weights import find

DECODE: Any = sglang_decode
PREFILL: Any = sglang_prefill
MANAGER: Any = TokenizerManager
FAKE_HOST: str = FAKE_BOOTSTRAP_HOST
ROWS = 16
HOST = "127.0.0.1"
PATIENCE_S = 20.0
_rooms = itertools.count(random.SystemRandom().getrandbits(40) + 1)


def wait_until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll `condition` as SGLang's loop does, and return when it is true."""
    pause, end = threading.Event(), time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"not within {patience_s} s: {what}"
        pause.wait(0.001)


def new_prompt(length: int, seed: int = 0) -> list[int]:
    """Return a prompt, another one for each seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, 40000, length)]


def new_request(prompt: Sequence[int], room: Any = None, port: int = 8998, **options: Any) -> Any:
    """Return SGLang's `Req` for one side of a request. If `room` is not given, it has a new room."""
    return Req(
        f"r{next(_rooms)}", "", array("q", prompt), SamplingParams(max_new_tokens=4), vocab_size=49152,
        bootstrap_host=HOST, bootstrap_port=port, bootstrap_room=next(_rooms) if room is None else room, **options,
    )  # fmt: skip


def new_generate(**fields: Any) -> Any:
    """Return a client's request as SGLang's HTTP server reads it."""
    return GenerateReqInput(**fields)


def new_tokenized(rid: str, host: str, port: int, room: Any) -> Any:
    """Return a request as SGLang's HTTP process sends it to the scheduler."""
    names = (
        "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids", "return_logprob", "logprob_start_len",
        "top_logprobs_num", "token_ids_logprob", "stream",
    )  # fmt: skip
    made = TokenizedGenerateReqInput(
        rid=rid, sampling_params=SamplingParams(), bootstrap_host=host, bootstrap_port=port, bootstrap_room=room,
        **dict.fromkeys(names),
    )  # fmt: skip
    made.time_stats = SimpleNamespace(
        set_api_server_dispatch_time=lambda: None, set_api_server_dispatch_finish_time=lambda: None
    )
    return made


@functools.cache
def server_args(mode: str) -> Any:
    """Return SGLang's options of a server with the packaged model."""
    args = ServerArgs(
        model_path=str(find("packaged")), device="cpu", attention_backend="torch_native", disaggregation_mode=mode,
        disaggregation_transfer_backend="kvroom", host=HOST,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args.resolve_once()
    return args


@contextlib.contextmanager
def configured(mode: str, port: int, device: str = "cpu") -> Iterator[tuple[Any, Any]]:
    """Configure this process as that of a server with its directory at `port`. Return SGLang's mode and options.

    `device` is the device of its pool, "cpu" or "cuda:0".
    """
    args = server_args(mode)
    get_context().set_server_args(args)
    kind = device.partition(":")[0]
    with get_disagg().override(disaggregation_bootstrap_port=port), get_device().override(device=kind):
        yield DisaggregationMode(mode), args


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    """Give SGLang's queues a process group of this process alone, as in a server with one rank."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    with get_parallel().override(attn_tp_group=SimpleNamespace(cpu_group=group), tp_rank=0):
        yield group


def model_config(folder: Path | None = None) -> Any:
    """Return SGLang's `ModelConfig` of the packaged model, or of the one in `folder`."""
    return ModelConfig.from_server_args(server_args("prefill")) if folder is None else ModelConfig(str(folder))


def new_pool(
    pages: int = 48,
    page_size: int = 16,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 2,
    device: str = "cpu",
) -> Any:
    """Return an SGLang pool of `pages` pages and one more, number 0, which SGLang gives to no request."""
    return MHATokenToKVPool(
        size=pages * page_size, page_size=page_size, dtype=dtype, head_num=heads, head_dim=8, layer_num=layers,
        device=device, enable_memory_saver=False,
    )  # fmt: skip


def new_buffers(**options: Any) -> Any:
    """Return SGLang's metadata buffers with `ROWS` rows."""
    given = {"hidden_size": 16, "hidden_states_dtype": torch.float32, "max_sampling_mask_tokens": 32, **options}
    return MetadataBuffers(ROWS, **given)


def new_rows() -> Any:
    """Return SGLang's allocator of metadata rows."""
    return ReqToMetadataIdxAllocator(ROWS)


def kv_args(pool: Any, buffers: Any, **others: Any) -> Any:
    """Return `KVArgs` as SGLang's queues fill them in for `pool`, with the fields `others` replaced."""
    args = KVArgs()
    args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = pool.get_contiguous_buf_infos()
    args.kv_layer_ids, args.num_draft_entries, args.kv_layout = [], 0, None
    args.kv_cache_dtype_str, args.page_size = str(pool.dtype), pool.page_size
    args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = buffers.get_buf_infos()
    setup_state_kv_args(args, pool)
    args.engine_rank = args.pp_rank = args.gpu_id = 0
    args.system_dp_rank, args.ib_device = None, None
    for name, value in others.items():
        setattr(args, name, value)
    return args


def row_of(buffers: Any, row: int) -> list[bytes]:
    """Return the bytes of one metadata row, a part for each buffer."""
    names = (
        "output_ids", "cached_tokens", "output_token_logprobs_val", "output_token_logprobs_idx",
        "output_top_logprobs_val", "output_top_logprobs_idx", "output_topk_p", "output_topk_index",
        "output_hidden_states", "bootstrap_room",
    )  # fmt: skip
    return [getattr(buffers, name)[row].view(torch.uint8).numpy().tobytes() for name in names]


def bytes_of(pool: Any) -> list[torch.Tensor]:
    """Return the pool's buffers as SGLang passes them to its attention, each as uint8[slots, bytes of a token]."""
    buffers = [pool.get_key_buffer(layer) for layer in range(pool.layer_num)]
    buffers += [pool.get_value_buffer(layer) for layer in range(pool.layer_num)]
    return [buffer.view(torch.uint8).view(buffer.shape[0], -1) for buffer in buffers]


def values_of(pool: Any, prompt: Sequence[int]) -> list[torch.Tensor]:
    """Return the values that the model computes: for each buffer, uint8[tokens, bytes of a token]."""
    seed = int.from_bytes(blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=8).digest(), "big")
    draw = np.random.default_rng(seed)
    return [
        torch.from_numpy(draw.integers(1, 256, (len(prompt), buffer.shape[1]), np.uint8)) for buffer in bytes_of(pool)
    ]


def set_variables(patch: pytest.MonkeyPatch, **variables: object) -> None:
    """Set the adapter's variables for managers that are created from now on, and unset all others."""
    for name in [name for name in os.environ if name.startswith("KVROOM_")]:
        patch.delenv(name)
    for name, value in {"transport": "memory", "rooms_port": "null", **variables}.items():
        patch.setenv(f"KVROOM_{name.upper()}", str(value))


def in_child(call: Callable[[], Any]) -> Any:
    """Run `call` in a forked process, where it may change SGLang's registries. Its result is returned as JSON."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside threads; this child starts none
        child = os.fork()
    if child == 0:
        said = {}
        try:
            said["result"] = call()
        except BaseException:  # noqa: BLE001 - the parent raises it
            said["error"] = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = json.loads(pipe.read() or '{"error": "the child ended without a result"}')
    os.waitpid(child, 0)
    assert "error" not in said, said["error"]
    return said["result"]

"""A double of the part of SGLang's `sgl_kernel` that its CPU engine needs. No build for the CPU can be installed.

SGLang imports nine names of this module when it runs on the CPU. One of them is called by every request, and is
implemented here in plain torch. The others, for speculative decoding and moves within the cache, raise an error. The
operators `torch.ops.sgl_kernel`, which use AMX, are absent, and SGLang uses the layers of torch in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, start_offset: torch.Tensor, end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor, _row_tokens: int,
) -> None:  # fmt: skip
    """Write the slots of each request's tokens [start, end) into its row of `req_to_token`.

    `out_cache_loc` has the slots of one request after the other.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        places = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = places.to(req_to_token.dtype)
        taken += end - start


def _absent(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: the double of tests/sglang/shim does not have this kernel")

    return refuse


assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")

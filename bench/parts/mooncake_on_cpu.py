"""A plug-in that lets SGLang's own Mooncake backend run without CUDA, for comparison only (bench/sglang_pair.py)."""

from __future__ import annotations


def register() -> None:
    """Have page numbers copied at once. Else the sender copies them into memory that CUDA pins."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False

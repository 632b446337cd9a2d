"""The options of SGLang that kvroom does not support yet. A server with one of them is refused when it starts.

Each of these options changes the content of a page, the rank that holds it, or the time at which SGLang frees it, so a
pair that used it could give wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kvroom.errors import ConfigurationError


class Refusal(NamedTuple):
    """An option that is not supported."""

    option: str
    """The name of the attribute in SGLang's `ServerArgs`."""
    is_used: Callable[[Any], bool]
    """A function that returns True for the values that are refused."""
    reason: str
    modes: tuple[str, ...] = ("prefill", "decode")
    """The sides on which it is refused."""

    @property
    def flag(self) -> str:
        """The option as it is written on the command line."""
        return "--" + self.option.replace("_", "-")


def _above_one(value: Any) -> bool:
    return value is not None and int(value) > 1


_RANKS = "kvroom serves one rank on each side"
_DRAFT = "the KV cache of a draft model is not handed over"

REFUSALS = (
    Refusal("tp_size", _above_one, _RANKS),
    Refusal("pp_size", _above_one, _RANKS),
    Refusal("dp_size", _above_one, _RANKS),
    Refusal("attn_cp_size", _above_one, _RANKS),
    Refusal("dcp_size", _above_one, _RANKS),
    Refusal("nnodes", _above_one, _RANKS),
    Refusal("speculative_algorithm", bool, _DRAFT),
    Refusal("enable_pd_role_switch", bool, "a server keeps its role"),
    Refusal("enable_memory_saver", bool, "the pool stays registered with the transport, so it cannot be unmapped"),
    Refusal("enable_hisparse", bool, "pages in host memory are not mapped"),
    Refusal("enable_unified_memory", bool, "pages that move during a transfer are not mapped"),
    Refusal("enable_pdmux", bool, "its two streams were never tried"),
    Refusal(
        "disaggregation_enable_kv_checksum",
        bool,
        "its digests need CUDA; KVROOM_CHECKSUM=1 on the decode side compares pools in host memory",
    ),
    Refusal("enable_hierarchical_cache", bool, "a prefix in host memory is not mapped", ("decode",)),
    Refusal(
        "disaggregation_decode_host_receive_threshold",
        lambda value: value is not None and value < 1,
        "pages in host memory are not mapped",
        ("decode",),
    ),
    Refusal("disaggregation_decode_enable_offload_kvcache", bool, "a prefix in host memory is not mapped", ("decode",)),
)


def refused(options: Any, mode: str) -> Iterator[str]:
    """Yield flag, value and reason of each option that is not supported in `mode`, "prefill" or "decode"."""
    for refusal in REFUSALS:
        value = getattr(options, refusal.option, None)
        if mode in refusal.modes and refusal.is_used(value):
            shown = refusal.flag if value is True else f"{refusal.flag} {value}"
            yield f"{shown} ({refusal.reason})"


def check(options: Any, mode: str) -> None:
    """Raise `ConfigurationError` with every option that is not supported in `mode`, "prefill" or "decode"."""
    found = list(refused(options, mode))
    if found:
        raise ConfigurationError(
            f"the transfer backend kvroom does not support {'; '.join(found)}: start the server without it, "
            f"or choose another --disaggregation-transfer-backend"
        )

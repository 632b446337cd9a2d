"""Translation of SGLang's `KVArgs` into kvroom's layout, and the fingerprint of the model.

All sizes are taken from the pool in memory and none from the model's configuration, because SGLang pads the heads of a
layer on some devices, and the pool is then larger than the configuration says.

    kv_data_ptrs   [K of layer 0, K of layer 1, ..., V of layer 0, V of layer 1, ...]
    one entry      pages x tokens x heads x head size ("NHD"), contiguous
    kv_item_lens   bytes of one page of each entry

Source: `KVArgs` of SGLang 0.5.23 in `disaggregation/base/conn.py`; `prefill.py` and `decode.py` in the same folder fill
it in.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvroom import KVLayout, KVRegion
from kvroom.errors import ConfigurationError, LayoutError

_REMEDY = "serve this model with another --disaggregation-transfer-backend"
_KV_FIELDS = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window", "layer_types",
    "rms_norm_eps", "intermediate_size", "hidden_act", "attention_bias", "vocab_size", "hidden_size",
    "num_hidden_layers",
)  # fmt: skip


def describe(args: Any, *, device: str, model: str, latent: bool) -> KVLayout:
    """Return the layout of the pool that `args`, SGLang's `KVArgs`, describes.

    Args:
        args: As filled in by SGLang's queue. The addresses must stay mapped for as long as the layout is used.
        device: The memory that holds the pool, such as "cpu" or "cuda:0", by this process's numbers.
        model: The fingerprint of the model, see `fingerprint`.
        latent: True if the pool holds latents (MLA) and not keys and values.

    Raises:
        ConfigurationError: The pool is of a kind that is not supported. The message names it.
    """
    states = ", ".join(str(kind.value) for kind in args.state_types or ())
    unsupported = {
        "a cache of latents (MLA)": latent,
        f"states beside the KV cache ({states})": args.state_types,
        "the KV cache of a draft model": args.num_draft_entries,
        f"the cache layout {args.kv_layout!r}": args.kv_layout is not None,
    }
    if any(unsupported.values()):
        named = " and ".join(name for name, is_present in unsupported.items() if is_present)
        raise ConfigurationError(f"the transfer backend kvroom does not hand over {named} yet; {_REMEDY}")
    entries = list(zip(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, strict=True))
    if not entries or len(entries) % 2:
        raise ConfigurationError(
            f"the KV pool has {len(entries)} buffers, not one K and one V for each layer; {_REMEDY}"
        )
    layers = len(entries) // 2
    regions = []
    for index, (base, nbytes, page_nbytes) in enumerate(entries):
        token_nbytes, rest = divmod(int(page_nbytes), int(args.page_size))
        if rest:
            raise ConfigurationError(
                f"buffer {index} of the KV pool has pages of {page_nbytes} bytes for {args.page_size} tokens, which is "
                f"not a whole number of bytes for each; {_REMEDY}"
            )
        regions.append(
            KVRegion(
                layer=int(args.kv_layer_ids[index]) if args.kv_layer_ids else index % layers,
                component="k" if index < layers else "v",
                base=int(base),
                pages=int(nbytes) // int(page_nbytes),
                page_stride=int(page_nbytes),
                page_tokens=int(args.page_size),
                token_stride=token_nbytes,
                # Each side has one rank, which holds all heads contiguously. They are moved together, so one head
                # stands for all of them.
                heads=1,
                head_stride=token_nbytes,
                head_bytes=token_nbytes,
                head_range=(0, 1),
                device=device,
            )
        )
    try:
        return KVLayout(tuple(regions), dtype=str(args.kv_cache_dtype_str), model=model)
    except LayoutError as error:
        raise ConfigurationError(f"SGLang's KV pool does not form a layout: {error}") from error


def fingerprint(model_config: Any, args: Any) -> str:
    """Return the fingerprint of the model. No byte is copied between two sides with different fingerprints.

    It covers the fields of the model's configuration that determine K and V. The weights are not read: two fine-tunes
    of one model have the same fingerprint, and a pair that serves both gives wrong tokens. Paths and revisions are left
    out, because each side may have a copy of its own.

    Args:
        model_config: SGLang's `ModelConfig`.
        args: SGLang's `KVArgs`, for the number of buffers in the pool.
    """
    text = model_config.hf_text_config
    architectures = sorted(str(name) for name in model_config.hf_config.architectures or ())
    fields = {name: getattr(text, name, None) for name in _KV_FIELDS}
    fields |= {"architectures": architectures, "kv_heads": int(model_config.get_total_num_kv_heads())}
    fields |= {"head_dim": int(model_config.head_dim), "buffers": len(args.kv_data_ptrs)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"sglang/{'+'.join(architectures)[:128]}/{digest}"

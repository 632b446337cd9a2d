"""SGLang's `KVArgs` as a layout: the pool as it lies in memory, and the model that it belongs to.

The numbers are those of the pool that exists, never of the model's configuration: SGLang pads the heads of a layer on
some devices, and then the configuration is wrong about the pool.

    kv_data_ptrs   [K of layer 0, K of layer 1, ..., V of layer 0, V of layer 1, ...]
    one entry      pages x tokens x heads x head size ("NHD"), contiguous
    kv_item_lens   bytes of one page of each entry

Source: `KVArgs` in SGLang 0.5.23, `disaggregation/base/conn.py`, filled in by `prefill.py` and `decode.py` beside it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvroom import KVLayout, KVRegion
from kvroom.errors import ConfigurationError, LayoutError

_ELSE = "serve this model with another --disaggregation-transfer-backend"
_DECIDES = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window", "layer_types",
    "rms_norm_eps", "intermediate_size", "hidden_act", "attention_bias", "vocab_size", "hidden_size",
    "num_hidden_layers",
)  # fmt: skip


def describe(args: Any, *, device: str, model: str, latent: bool) -> KVLayout:
    """Return the layout of the pool that `args`, SGLang's `KVArgs`, describes.

    Args:
        args: filled in by SGLang's queue; its addresses must stay mapped for as long as the layout is used.
        device: memory of the pool in kvroom's terms, "cpu" or "cuda:0", as this process numbers it.
        model: fingerprint of the model, see `fingerprint`.
        latent: the pool holds latents (MLA) instead of keys and values.

    Raises:
        ConfigurationError: the pool holds something that is not mapped; the message names it.
    """
    states = ", ".join(str(kind.value) for kind in args.state_types or ())
    unmapped = {
        "a cache of latents (MLA)": latent,
        f"states beside the KV cache ({states})": args.state_types,
        "the KV cache of a draft model": args.num_draft_entries,
        f"the cache layout {args.kv_layout!r}": args.kv_layout is not None,
    }
    if any(unmapped.values()):
        named = " and ".join(name for name, is_there in unmapped.items() if is_there)
        raise ConfigurationError(f"the transfer backend kvroom does not hand over {named} yet; {_ELSE}")
    entries = list(zip(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, strict=True))
    if not entries or len(entries) % 2:
        raise ConfigurationError(f"the KV pool has {len(entries)} buffers, not one K and one V for each layer; {_ELSE}")
    layers = len(entries) // 2
    regions = []
    for index, (base, nbytes, page_nbytes) in enumerate(entries):
        token_nbytes, rest = divmod(int(page_nbytes), int(args.page_size))
        if rest:
            raise ConfigurationError(
                f"buffer {index} of the KV pool has pages of {page_nbytes} bytes for {args.page_size} tokens; {_ELSE}"
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
                # One rank has all heads, in one piece: how many there are need not be known to move them.
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
        raise ConfigurationError(f"SGLang's KV pool makes no layout: {error}") from error


def fingerprint(model_config: Any, args: Any) -> str:
    """Return what of the model both sides must agree on before a byte may be copied.

    It covers the fields of the model's configuration that decide what K and V are. The weights are not read: two
    fine-tunes of one model have the same fingerprint, and serving them as a pair gives wrong tokens. Paths and
    revisions do not count, since both sides may have their own copies.

    Args:
        model_config: SGLang's `ModelConfig`.
        args: SGLang's `KVArgs`, for the number of its buffers.
    """
    text = model_config.hf_text_config
    architectures = sorted(str(name) for name in model_config.hf_config.architectures or ())
    said = {name: getattr(text, name, None) for name in _DECIDES}
    said |= {"architectures": architectures, "kv_heads": int(model_config.get_total_num_kv_heads())}
    said |= {"head_dim": int(model_config.head_dim), "buffers": len(args.kv_data_ptrs)}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"sglang/{'+'.join(architectures)[:128]}/{digest}"

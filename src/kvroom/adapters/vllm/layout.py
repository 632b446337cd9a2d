"""Conversion of vLLM's configuration and cache tensors to kvroom's layout, ranks and fingerprint.

The law: strides and addresses come from the tensors themselves, and an unsupported cache is refused by name.

vLLM presents the cache of every layer as a tensor [B, H, N, C]: blocks, KV heads of this rank, tokens of a block,
content. Only the strides show their order in memory (HND, NHD, all layers in one block). The content is

    K | V       most backends: `head_size` lanes of K, then `head_size_v` of V        components "k" and "v"
    latent      MLA: one head that holds the whole latent                             component "latent"
    cell        K, V and their scales packed for one token and head                   component "kv", with a format
    page        only the page of a head as a whole has a meaning: CPU attention,      component "kv", "latent" or
                packed MLA, the indexer of sparse MLA                                 "indexer", with a format
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvroom import KVGroup, KVLayout, KVRegion, Parallel, Place
from kvroom.errors import ConfigurationError, LayoutError

from .blocks import BlockGroup, groups_of

_KEY_VALUE = frozenset(
    ("FLASH_ATTN", "FLASH_ATTN_DIFFKV", "FLASHINFER", "TRITON_ATTN", "TRITON_ATTN_DIFFKV", "FLEX_ATTENTION", "HPC_ATTN")
)
_CELLS = frozenset(("int8_per_token_head", "fp8_per_token_head"))
_LATENT = frozenset(("CPU_MLA", "TRITON_MLA", "CUTLASS_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "FLASHINFER_MLA"))
_ELSE = "serve the model with another --attention-backend, or without kvroom"


class _Cache(NamedTuple):
    """One layer's cache: heads [first_head, first_head + H) of the model, in `blocks` blocks of vLLM.

    vLLM may register each of its blocks as `split` smaller ones, in the size that the attention kernel requires.
    """

    name: str
    number: int
    backend: str
    layer: Any
    spec: Any
    tensor: Any
    group: str
    first_head: int
    blocks: int

    @property
    def itemsize(self) -> int:
        return int(self.tensor.element_size())

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(int(stride) * self.itemsize for stride in self.tensor.stride())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape)

    @property
    def split(self) -> int:
        return self.shape[0] // self.blocks

    def refusal(self, why: str, remedy: str = _ELSE) -> ConfigurationError:
        return ConfigurationError(
            f"layer {self.name} of {self.backend}: a cache of shape {self.shape}, strides {self.strides} bytes and "
            f"{type(self.spec).__name__} {why}; {remedy}"
        )


def describe(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any], here: Place | None = None
) -> KVLayout:
    """Return the layout of a rank's cache. Page numbers are vLLM's block ids.

    A layer that uses another layer's cache (cross-layer sharing) adds nothing.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: vLLM's configuration of the KV cache.
        kv_caches: The tensors passed to `register_kv_caches`, by layer name. They must live as long as the layout.
        here: The place of this worker; by default the one that vLLM has assigned to this process.

    Raises:
        ConfigurationError: The caches or the parallelism are not supported.
    """
    _refuse_context_parallel(vllm_config)
    groups = groups_of(kv_cache_config)
    found = list(_caches(vllm_config, kv_cache_config, groups, kv_caches, (here or place(vllm_config)).tp))
    regions = tuple(region for cache in found for region in _regions(cache, vllm_config))
    declared = tuple(KVGroup(name=group.name, window=group.window) for group in groups if group.name)
    try:
        return KVLayout(regions, _cache_dtype(vllm_config), fingerprint(vllm_config), declared)
    except LayoutError as refused:
        raise ConfigurationError(f"vLLM's caches make no layout: {refused}") from refused


def _caches(
    vllm_config: Any, kv_cache_config: Any, groups: tuple[BlockGroup, ...], kv_caches: Mapping[str, Any], tp_rank: int
) -> Iterator[_Cache]:
    """Yield the caches of all layers that have one of their own."""
    layers = vllm_config.compilation_config.static_forward_context
    left = dict(kv_caches)
    held = set()
    for group in groups:
        spec = kv_cache_config.kv_cache_groups[group.number].kv_cache_spec
        for name in kv_cache_config.kv_cache_groups[group.number].layer_names:
            tensor = left.pop(name, None)
            layer = layers.get(name)
            if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
                continue
            if tensor is None or layer is None:
                raise ConfigurationError(
                    f"layer {name} of KV cache group {group.number} has no tensor among the {len(kv_caches)} given: "
                    f"this vLLM registers them in another way; use a version that the connector was tested with"
                )
            one = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            index, backend = layer_index(name), str(layer.get_attn_backend().get_name())
            held.add(tensor.data_ptr())
            yield _Cache(
                name=name,
                number=index,
                backend=backend,
                layer=layer,
                spec=one,
                tensor=tensor,
                group=group.name,
                first_head=_first_head(vllm_config, name, index, one, tp_rank),
                blocks=kv_cache_config.num_blocks,
            )
    strange = [name for name, tensor in left.items() if tensor.data_ptr() not in held]
    if strange:
        raise ConfigurationError(
            f"layers {strange[:3]} are in no KV cache group and share no other layer's cache; serve the model without "
            f"kvroom"
        )


def layer_index(name: str) -> int:
    """Return the number of a layer in the whole model, which is the first number in its name.

    The layers of a draft model are numbered after the model's own. Raise `ConfigurationError` for a name without one.
    """
    index = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    if index is None:
        raise ConfigurationError(
            f"layer {name} has no number in its name, so the two sides could not match it; "
            f"serve the model without kvroom"
        )
    return index


def _first_head(vllm_config: Any, name: str, index: int, spec: Any, tp_rank: int) -> int:
    """Return the model's number of a layer's first KV head on this rank, by vLLM's rule.

    Heads divide evenly. With fewer heads than ranks, each rank has one, and neighbouring ranks have the same one.
    """
    tp, local = int(vllm_config.parallel_config.tensor_parallel_size), int(spec.num_kv_heads)
    if "MLA" in type(spec).__name__ or tp == 1:
        return 0
    model = vllm_config.model_config
    if index >= model.get_total_num_hidden_layers():  # layers behind the model's own are those of its draft model
        draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
        total = int((draft or model).get_total_num_kv_heads())
    else:
        total = int(model.model_arch_config[index].total_num_kv_heads)
    if local != max(1, total // tp):
        raise ConfigurationError(
            f"layer {name} has {local} KV heads on each of {tp} tensor parallel ranks, but the model {total}: which "
            f"of them are here is not known; serve the model with --tensor-parallel-size 1"
        )
    return tp_rank * total // tp


def _regions(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return the regions of one layer, which depend on the form of its content."""
    if len(cache.shape) != 4:
        raise cache.refusal("is not [blocks, heads, tokens, content]")
    if cache.strides[3] != cache.itemsize:
        raise cache.refusal("does not keep the content of one token and head in one piece")
    spec = cache.spec
    slots, packed = getattr(spec, "num_head_slots", None), getattr(spec, "state_content_bytes", None)
    if slots is not None or getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "model_version", None):
        raise cache.refusal("packs its heads or tokens in a way that this connector does not support")
    if cache.shape[0] % cache.blocks or cache.shape[2] * cache.split != spec.block_size:
        raise cache.refusal(f"does not hold vLLM's {cache.blocks} blocks of {spec.block_size} tokens")
    if "MLA" in type(spec).__name__:
        return _latent(cache, vllm_config)
    if cache.backend == "CPU_ATTN":
        return _cpu_pages(cache, vllm_config)
    if packed is not None and cache.backend == "TRITON_ATTN" and vllm_config.cache_config.cache_dtype in _CELLS:
        return [_region(cache, "kv", 0, packed, _format(vllm_config, cache))]
    if packed is not None or cache.backend not in _KEY_VALUE:
        raise cache.refusal("comes from a backend whose pages this connector does not support")
    key, value = spec.head_size * cache.itemsize, spec.head_size_v * cache.itemsize
    if cache.shape[3] * cache.itemsize != key + value:
        raise cache.refusal(f"does not hold {key} bytes of K and {value} of V for one token and head")
    return [_region(cache, "k", 0, key), _region(cache, "v", key, value)]


def _latent(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return the regions of MLA: one head, complete on each tensor-parallel rank. Packed pages are copied whole."""
    if cache.shape[1] != 1:
        raise cache.refusal("has several heads, but MLA keeps one latent")
    role = getattr(cache.spec, "cache_role", None)
    if getattr(role, "value", role) == "indexer":
        return [_whole_page(cache, "indexer", _format(vllm_config, cache))]
    if cache.spec.state_content_bytes is not None or cache.backend not in _LATENT:
        return [_whole_page(cache, "latent", _format(vllm_config, cache))]
    return [_region(cache, "latent", 0, cache.shape[3] * cache.itemsize)]


def _cpu_pages(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return the regions of CPU attention, one per head, because the order within a page depends on the processor."""
    isa = getattr(cache.layer, "isa", "")
    if not isa:  # the layer does not have it yet: use the function by which vLLM chooses
        from vllm.v1.attention.backends import cpu_attn

        choose = cpu_attn._get_attn_isa  # noqa: SLF001 - there is no public name for it
        model, kind = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
        isa = choose(model, cache.shape[2], cache.spec.head_size, kind)
    form = _format(vllm_config, cache, str(isa), platform.machine())
    heads = range(cache.shape[1])
    return [_whole_page(cache, "kv", form, cache.first_head + head, head) for head in heads]


def _whole_page(cache: _Cache, component: str, form: str, model_head: int = 0, head: int = 0) -> KVRegion:
    """Return the region of one head whose pages can only be copied whole."""
    tokens = cache.shape[2]
    row = cache.shape[3] * cache.itemsize
    if tokens > 1 and cache.strides[2] != row:
        raise cache.refusal("does not keep the page of a head in one piece, as its kernel needs it")
    if cache.split > 1 and cache.strides[0] != tokens * row:
        raise cache.refusal(*_scattered(cache))
    tokens *= cache.split
    return KVRegion(
        layer=cache.number,
        component=component,
        base=int(cache.tensor.data_ptr()) + head * cache.strides[1],
        pages=cache.blocks,
        page_stride=cache.strides[0] * cache.split,
        page_tokens=tokens,
        token_stride=tokens * row,
        heads=1,
        head_stride=tokens * row,
        head_bytes=tokens * row,
        head_range=(model_head, model_head + 1),
        device=str(cache.tensor.device),
        group=cache.group,
        span=tokens,
        format=form,
    )


def _region(cache: _Cache, component: str, offset: int, nbytes: int, form: str = "") -> KVRegion:
    """Return the region of `nbytes` of each token and head, `offset` bytes into its content."""
    if offset + nbytes > cache.shape[3] * cache.itemsize:
        raise cache.refusal(f"has no {offset + nbytes} bytes for one token and head")
    _, heads, tokens, _ = cache.shape
    by_page, by_head, by_token, _ = cache.strides
    if cache.split > 1 and by_page != tokens * by_token:
        raise cache.refusal(*_scattered(cache))
    return KVRegion(
        layer=cache.number,
        component=component,
        base=int(cache.tensor.data_ptr()) + offset,
        pages=cache.blocks,
        page_stride=by_page * cache.split,
        page_tokens=tokens * cache.split,
        token_stride=by_token,
        heads=heads,
        head_stride=by_head,
        head_bytes=nbytes,
        head_range=(cache.first_head, cache.first_head + heads),
        device=str(cache.tensor.device),
        group=cache.group,
        format=form,
    )


def _scattered(cache: _Cache) -> tuple[str, str]:
    return (
        f"splits each of vLLM's {cache.blocks} blocks into {cache.split}, whose tokens do not follow each other",
        f"set --block-size {cache.shape[2]}",
    )


def _format(vllm_config: Any, cache: _Cache, *more: str) -> str:
    """Return the format of opaque bytes, which is equal only if the same kernels interpret them in the same way."""
    from vllm import __version__

    release = __version__.partition("+")[0]
    spec = cache.spec
    parts = (
        f"vllm-{release}",
        cache.backend,
        *more,
        f"block={cache.shape[2]}",
        f"head={spec.head_size}",
        f"cell={cache.shape[3] * cache.itemsize}",
        _cache_dtype(vllm_config),
    )
    return "/".join(parts)


def _cache_dtype(vllm_config: Any) -> str:
    """Return the cache's element type, with the model's type for a quantized cache, whose scales are weights."""
    from vllm.platforms import current_platform

    kind = str(vllm_config.cache_config.cache_dtype)
    model = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if kind in ("fp8", "fp8_e4m3"):  # the hardware determines which of two kinds of E4M3 this is
        kind = str(current_platform.fp8_dtype()).removeprefix("torch.")
    return model if kind in ("auto", model) else f"{kind} of {model}"


_DECIDES = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window", "layer_types",
    "kv_lora_rank", "qk_rope_head_dim", "rms_norm_eps", "intermediate_size", "hidden_act", "attention_bias",
)  # fmt: skip


def fingerprint(vllm_config: Any) -> str:
    """Return the fingerprint of the model, on which both sides must agree before a byte is copied.

    It covers the fields of the model's configuration that determine K and V. The weights are not read: two fine-tunes
    of one model have the same fingerprint, and serving them as a pair gives wrong tokens. Paths and revisions are
    ignored, because each side may have its own copy.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    architectures = sorted(str(name) for name in model.architectures)
    shape = {
        "architectures": architectures,
        "layers": int(model.get_total_num_hidden_layers()),
        "kv_heads": int(model.get_total_num_kv_heads()),
        "head_size": int(model.get_head_size()),
        "hidden_size": int(model.get_hidden_size()),
        "vocab_size": int(model.get_vocab_size()),
    }
    more = {name: getattr(text, name, None) for name in _DECIDES}
    text_form = json.dumps({**shape, **more}, sort_keys=True, default=str)
    digest = hashlib.sha256(text_form.encode()).hexdigest()[:16]
    return f"{'+'.join(architectures)[:128]}/{digest}"


def parallel(vllm_config: Any) -> Parallel:
    """Return how this engine splits the model over its ranks. Raise `ConfigurationError` for context parallelism.

    In vLLM data-parallel ranks are engines of their own, each with a scheduler, and so they are here (see
    `start.directory`).
    """
    from vllm.distributed.utils import get_pp_indices

    _refuse_context_parallel(vllm_config)
    config, model = vllm_config.parallel_config, vllm_config.model_config
    stages: tuple[int, ...] = ()
    if config.pipeline_parallel_size > 1:
        layers = model.get_total_num_hidden_layers()
        ends = [
            get_pp_indices(layers, rank, config.pipeline_parallel_size) for rank in range(config.pipeline_parallel_size)
        ]
        stages = tuple(stop - start for start, stop in ends)
    return Parallel(
        tp=config.tensor_parallel_size,
        pp=config.pipeline_parallel_size,
        stages=stages,
        kv_heads=0 if model.use_mla else int(model.get_total_num_kv_heads()),
    )


def place(vllm_config: Any) -> Place:
    """Return the place of this process's worker. Works only in a worker, after vLLM has created its process groups."""
    config, tp, pp = vllm_config.parallel_config, 0, 0
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        from vllm.distributed import parallel_state

        tp = int(parallel_state.get_tensor_model_parallel_rank())
        pp = int(parallel_state.get_pp_group().rank_in_group)
    return Place(dp=0, cp=0, tp=tp, pp=pp)


def _refuse_context_parallel(vllm_config: Any) -> None:
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise ConfigurationError(
                f"{name} is {size}: this connector cannot hand over the tokens of context parallel ranks yet; set it "
                f"to 1"
            )

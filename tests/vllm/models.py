"""Small random models for tests of how a model is split: quick to start and exact, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WINDOW = 256
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip


def two_heads(packaged: Path, folder: Path) -> Path:
    """A Llama of 4 layers with 4 heads, 2 of them for K and V: the packaged model's 3 cannot be shared by two ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _saved(LlamaConfig, LlamaForCausalLM, packaged, folder)


def sliding(packaged: Path, folder: Path) -> Path:
    """A Gemma 3 of 4 layers, three of them with a window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return _saved(Gemma3TextConfig, Gemma3ForCausalLM, packaged, folder, sliding_window=WINDOW, layer_types=kinds)


def _saved(config: Any, model: Any, packaged: Path, folder: Path, **more: Any) -> Path:
    """The folder, with this model and the packaged one's tokenizer in it."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    model(config(vocab_size=len(tokenizer), **SIZE, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Small random models for tests of how a model is split: quick to start and exact, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WINDOW = 256
RANK = 8
"""The rank of a LoRA adapter, the smallest that vLLM takes."""
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip


def two_heads(packaged: Path, folder: Path) -> Path:
    """Save a Llama of 4 layers with 4 query heads and 2 KV heads: two ranks cannot share the packaged model's 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _saved(LlamaConfig, LlamaForCausalLM, packaged, folder)


def sliding(packaged: Path, folder: Path) -> Path:
    """Save a Gemma 3 of 4 layers, three of them with a sliding window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return _saved(Gemma3TextConfig, Gemma3ForCausalLM, packaged, folder, sliding_window=WINDOW, layer_types=kinds)


def _saved(config: Any, model: Any, packaged: Path, folder: Path, **more: Any) -> Path:
    """Save this model and the packaged model's tokenizer in the folder. Return it."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    model(config(vocab_size=len(tokenizer), **SIZE, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """Save a LoRA adapter for the attention of the model in `base` in the folder. Return the folder.

    Its weights are random, and large enough to change even the first token. The files are those of PEFT 0.17
    (`LoraModel`, `save_pretrained`).
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    outer = {"q_proj": config.num_attention_heads * head, "v_proj": config.num_key_value_heads * head}
    draw = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        for name, rows in outer.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, config.hidden_size, generator=draw)
            weights[f"{at}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(outer), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **about}))
    return folder

"""Models of a few thousand random weights and a tokenizer of bytes, made in milliseconds without a download."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconH1Config,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from kvroom.engine.request import Request
from kvroom.engine.sampling import Sampler
from kvroom.engine.weights import LoadedModel, wrap

EOS = 256
SIZES = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # large, so that no two logits are close to each other
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": lambda **sizes: MixtralConfig(sliding_window=None, num_local_experts=4, **sizes),
    "mistral": lambda **sizes: MistralConfig(sliding_window=None, **sizes),
}
WINDOW = 12
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8}
# Layers with a sliding window beside one that keeps everything.
SLIDING = {
    "gemma3": lambda **sizes: Gemma3TextConfig(query_pre_attn_scalar=8, **{**_SLIDING, **sizes}),
    "cohere2": lambda **sizes: Cohere2Config(**{**_SLIDING, **sizes}),
    "qwen3-sliding": lambda **sizes: Qwen3Config(use_sliding_window=True, **{**_SLIDING, **sizes}),
}
# Layers with a state beside one that attends; in falcon-h1 every layer does both.
STATEFUL = {
    "lfm2": lambda **sizes: Lfm2Config(layer_types=["conv", "full_attention", "conv"], conv_L_cache=3, **sizes),
    "qwen3-next": lambda **sizes: Qwen3NextConfig(
        linear_conv_kernel_dim=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=0,
        mlp_only_layers=[0, 1, 2],
        **{**_LINEAR, **sizes},
    ),
    "granite-hybrid": lambda **sizes: GraniteMoeHybridConfig(
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        shared_intermediate_size=64,
        **{**_MAMBA, **sizes},
    ),
    "falcon-h1": lambda **sizes: FalconH1Config(mamba_d_ssm=96, **{**_MAMBA, **sizes}),
}
# Every layer has a sliding window, so separate pages for these layers would save no memory.
ALL_SLIDING = {"mistral-sliding": lambda **sizes: MistralConfig(sliding_window=WINDOW, **sizes)}


class Tiny(NamedTuple):
    """A model for the engine, and the same weights in plain transformers to compare it with."""

    loaded: LoadedModel
    reference: Any

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the greedy continuation of `transformers.generate`, which ends after an end token."""
        ids = torch.tensor([list(prompt)])
        out = self.reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def sample(self, request: Request) -> list[int]:
        """Return the tokens that a sampler chooses from the logits of transformers; end tokens do not end it."""
        sampler = Sampler(request)
        tokens: list[int] = []
        while len(tokens) < request.max_tokens:
            with torch.inference_mode():
                logits = self.reference(torch.tensor([[*request.prompt_ids, *tokens]])).logits[0, -1]
            tokens.append(sampler.choose(logits).token_id)
        return tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of UTF-8 bytes: token i is byte i, and token 256 ends a text."""
    # ByteLevel writes byte b as the b-th entry of this alphabet in its own order: printable bytes stand for themselves.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Tiny:
    """Return a random model of this architecture, float32 on the CPU."""
    torch.manual_seed(seed)
    config = {**CONFIGS, **SLIDING, **STATEFUL, **ALL_SLIDING}[kind](**{**SIZES, **changes})
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    reference.eval()
    return Tiny(wrap(copy.deepcopy(reference), byte_tokenizer(), name=f"tiny-{kind}"), reference)


def prompt(length: int, *, seed: int = 0) -> tuple[int, ...]:
    """Return random bytes as a prompt."""
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())

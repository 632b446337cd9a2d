"""Models of a few thousand random weights and a tokenizer of bytes: made here in milliseconds, nothing downloaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
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
    "initializer_range": 0.4,  # large, so that no two logits are near each other
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


class Tiny(NamedTuple):
    """A model for the engine, and the same weights in plain transformers to compare it with."""

    loaded: LoadedModel
    reference: Any

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """What `transformers.generate` continues with, greedily; it ends after an end token."""
        ids = torch.tensor([list(prompt)])
        out = self.reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def sample(self, request: Request) -> list[int]:
        """What one sampler chooses from the logits of plain transformers, end tokens like all others."""
        sampler = Sampler(request)
        tokens: list[int] = []
        while len(tokens) < request.max_tokens:
            with torch.inference_mode():
                logits = self.reference(torch.tensor([[*request.prompt_ids, *tokens]])).logits[0, -1]
            tokens.append(sampler.choose(logits).token_id)
        return tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i of a text's UTF-8; token 256 ends it."""
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
    """A random model of this architecture, float32 on the CPU."""
    torch.manual_seed(seed)
    reference = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **changes}), attn_implementation="sdpa")
    reference.eval()
    return Tiny(wrap(copy.deepcopy(reference), byte_tokenizer(), name=f"tiny-{kind}"), reference)


def prompt(length: int, *, seed: int = 0) -> tuple[int, ...]:
    """Random bytes as a prompt."""
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())

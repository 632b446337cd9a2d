"""The answers that one process gives: plain `transformers.generate`, without anything of our engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """A model in this process, greedy. `directory` is in transformers' format."""

    def __init__(self, directory: Path, *, dtype: str, device: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        ).to(device)

    def chat_ids(self, content: str) -> list[int]:
        """The prompt tokens of a chat with one user turn."""
        turns = [{"role": "user", "content": content}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def greedy(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that follow, the ending one included, at most `max_tokens`."""
        prompt = torch.tensor([list(prompt_ids)], device=self._model.device)
        output = self._model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_tokens
        )
        tokens: list[int] = output[0, len(prompt_ids) :].tolist()
        return tokens

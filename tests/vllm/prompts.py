"""Prompts as token ids: ten short and ten long ones, the same in every run, no two with a first sentence in common."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

SHORT = 10
LONG = 10
LONG_TOKENS = (690, 810)
Prompt = tuple[int, ...]

QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in cold water.",
    "Explain in one sentence why the sky looks blue.",
    "How many legs do two spiders have together?",
    "Write a short greeting for a new neighbour.",
    "What does a baker do before the sun rises?",
    "Give me two reasons to learn to play the piano.",
    "Which planet is closest to the sun, and what is it like there?",
    "Describe a train station on a rainy evening.",
    "What should somebody pack for a weekend in the mountains?",
)
_WHO = (
    "The miller", "An old captain", "Her youngest brother", "The night watchman", "A travelling painter", "The clerk",
    "Our neighbour", "The gardener", "A tired postman", "The village teacher", "Somebody in a grey coat", "The cook",
)  # fmt: skip
_DID = (
    "carried the lamp to", "wrote a letter about", "counted every stone of", "forgot the name of", "dreamed about",
    "sold a map of", "repaired the door of", "told the children about", "walked around", "made a drawing of",
)  # fmt: skip
_WHAT = (
    "the bridge by the river", "an empty house", "the harbour", "the oldest tree in the park", "a clock tower",
    "the market square", "a small island", "the railway tunnel", "the library's cellar", "a lighthouse in the fog",
)  # fmt: skip
_WHEN = (
    "before the first snow fell", "while the bells were ringing", "although nobody had asked for it",
    "on the longest day of the year", "because the rain would not stop", "after the last guest had left",
    "as soon as the ice was gone", "when the wind turned north",
)  # fmt: skip


def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def short(model: Path) -> list[Prompt]:
    """Return ten questions in the model's chat format, each of some tens of tokens."""
    return [_chat(tokenizer(model), question) for question in QUESTIONS[:SHORT]]


def long(model: Path) -> list[Prompt]:
    """Return ten stories with a question at the end, each of about 800 tokens."""
    return [story(model, seed) for seed in range(LONG)]


def story(model: Path, seed: int, tokens: int = 0) -> Prompt:
    """Return a random story of exactly `tokens` tokens, or, for 0, of a length drawn from `LONG_TOKENS`.

    To reach an exact length, the beginning of the story is cut off behind the chat's first tokens.
    """
    draw = random.Random(f"story {seed}")
    wanted = tokens or draw.randrange(*LONG_TOKENS)
    words = tokenizer(model)
    text = f"Story number {seed + 1}."
    while len(words(text)["input_ids"]) < wanted - 60:
        chunk = (
            f"{draw.choice(_WHO)} {draw.choice(_DID)} {draw.choice(_WHAT)} {draw.choice(_WHEN)}." for _ in range(8)
        )
        text = f"{text} {' '.join(chunk)}"
    ids = _chat(words, f"{text} Who is in this story, and what happens to them?")
    return ids[:16] + ids[len(ids) - tokens + 16 :] if tokens else ids


def _chat(words: Any, question: str) -> Prompt:
    messages = [{"role": "user", "content": question}]
    ids = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    return tuple(int(one) for one in ids)

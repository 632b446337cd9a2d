"""Incremental conversion of tokens to text. A piece of text is final once it was returned.

The joined pieces of a stream equal `tokenizer.decode` of all its tokens, cut before the first stop string. Text that
may still become part of a character or of a stop string is held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

_INCOMPLETE = "\ufffd"  # a decoder's substitute for bytes that do not form a character, or not yet


class Decoder(Protocol):
    """The method of a transformers tokenizer that `TextStream` uses."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class TextPiece(NamedTuple):
    text: str
    stopped: bool


class TextStream:
    """The text of one generation. Special tokens contribute no text."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # The tokens of the last returned text. Decoders treat the first token of a text specially, so new tokens are
        # always decoded together with these.
        self._context: list[int] = []
        self._pending: list[int] = []  # tokens whose text was not returned yet
        self._shown = ""  # the text of `_context`
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> TextPiece:
        """Add a token and return the new text. If `stopped` is set, the text ends before a stop string: add no more."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(_INCOMPLETE):
            return TextPiece("", stopped=False)
        return self._match(self._advance(text))

    def finish(self) -> TextPiece:
        """Return the text that was held back, after the last token."""
        piece = self._match(self._advance(self._decode(self._context + self._pending)))
        return piece if piece.stopped else TextPiece(piece.text + self._held, stopped=False)

    def _advance(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        if fresh:
            self._context = self._pending
            self._shown = self._decode(self._context)
        self._pending = []
        return fresh

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _match(self, fresh: str) -> TextPiece:
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return TextPiece(text[: min(found)], stopped=True)
        held = 0  # length of the longest suffix of the text that is a proper prefix of a stop string
        for stop in self._stop:
            longest = min(len(text), len(stop) - 1)
            held = max(held, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        self._held = text[len(text) - held :]
        return TextPiece(text[: len(text) - held], stopped=False)

"""From tokens to text while they come: no piece ever has to be taken back.

The pieces of a stream joined are `tokenizer.decode` of all its tokens, cut before the first stop string. What might
still become part of a character or of a stop string is held until it is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class TextPiece(NamedTuple):
    text: str
    stopped: bool


class TextStream:
    """The text of one generation. Special tokens have no text."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context: list[int] = []  # decoders treat the first token of a text in their own way: never start afresh
        self._pending: list[int] = []
        self._shown = ""  # the text of _context, passed on already
        self._held = ""  # may be the beginning of a stop string

    def push(self, token_id: int) -> TextPiece:
        """Add a token. `stopped`: a stop string was found; the text ends before it and nothing may follow."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(_INCOMPLETE):
            return TextPiece("", stopped=False)
        return self._match(self._advance(text))

    def finish(self) -> TextPiece:
        """No token follows: pass on what was held."""
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
        held = 0  # the length of the longest end of the text that begins a stop string without being all of it
        for stop in self._stop:
            longest = min(len(text), len(stop) - 1)
            held = max(held, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        self._held = text[len(text) - held :]
        return TextPiece(text[: len(text) - held], stopped=False)

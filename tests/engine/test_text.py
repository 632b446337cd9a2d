"""Streamed text: no text is sent that would have to be taken back, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.engine.text import TextStream

from .tiny import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """Return the pieces of text of these tokens up to a stop string, and True if there was one."""
    text = TextStream(TOKENIZER, stop)
    pieces = []
    for token_id in ids:
        piece = text.push(token_id)
        pieces.append(piece.text)
        if piece.stopped:
            return pieces, True
    piece = text.finish()
    return [*pieces, piece.text], piece.stopped


@given(st.text(max_size=30))
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces, stopped = stream(list(text.encode()))
    assert "".join(pieces) == text
    assert not stopped


@given(st.lists(st.integers(0, EOS), max_size=30))
def test_pieces_of_any_tokens_joined_are_what_the_tokenizer_says_of_all(ids: list[int]) -> None:
    assert "".join(stream(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_is_shown_when_its_last_byte_is_here() -> None:
    assert stream(list("é€😀".encode()))[0] == ["", "é", "", "", "€", "", "", "", "😀", ""]


@given(st.text(alphabet="ab\n", max_size=20), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Compare with a slow, obvious oracle: the first prefix of the text that contains a stop string ends it."""
    pieces, stopped = stream(list(text.encode()), tuple(stop))
    for end in range(len(text) + 1):
        found = [at for at in (text[:end].find(one) for one in stop) if at >= 0]
        if found:
            assert stopped
            assert "".join(pieces) == text[: min(found)]
            assert len(pieces) == end  # the stream stopped with the token that completed the stop string
            return
    assert not stopped
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("one END", "END", ["o", "n", "e", " ", "", "", ""]),
        ("xENx", "END", ["x", "", "", "ENx", ""]),
        ("EENDx", "END", ["", "E", "", ""]),
        ("EN", "END", ["", "", "EN"]),
    ],
)
def test_what_may_become_a_stop_string_is_held(text: str, stop: str, pieces: list[str]) -> None:
    assert stream(list(text.encode()), (stop,))[0] == pieces

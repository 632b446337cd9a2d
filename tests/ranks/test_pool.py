"""The base of the checks between ranks: every element has its own word, and every byte of a pool is looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvroom.plan.ranks import Place
from kvroom_lab.ranks import words
from kvroom_lab.ranks.cases import BY_NAME, CASES, Case, pieces
from kvroom_lab.ranks.pool import GAP_BYTES, RankPool
from kvroom_lab.ranks.requests import Placed, place_to_receive

FIRST = Place(0, 0, 0, 0)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    one = RankPool(BY_NAME["hybrid-tp2-tp1"], "sink", FIRST)
    yield one
    one.close()


@pytest.fixture
def placed(pool: RankPool) -> Placed:
    return place_to_receive(pool, 77, 8)


def test_a_word_says_what_it_is() -> None:
    (word,) = words.words(room=7, layer=3, component=1, token=1000, head=5, lane=9)
    assert words.read(int(word)) == "room 7, layer 3 v, token 1000, head 5, lane 9"
    assert words.read(int(words.filler(4, 1)[3])) == "filler 3 of side 1"
    assert words.read(int(word) ^ 1) != words.read(int(word))


def test_no_two_words_are_equal_and_no_byte_of_one_stands_for_it() -> None:
    every = words.words(
        room=1,
        layer=np.arange(8, dtype=np.uint64)[:, None, None],
        component=2,
        token=np.arange(64, dtype=np.uint64)[:, None],
        head=0,
        lane=np.arange(16, dtype=np.uint64),
    ).ravel()
    assert np.unique(every).size == every.size
    for column in every.view(np.uint8).reshape(-1, 8).T:  # each byte takes every value, about equally often
        counts = np.bincount(column, minlength=256)
        assert counts.min() > 0
        assert counts.max() < 4 * every.size / 256


def test_a_field_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="head is 1024: it must be below 1024"):
        words.words(room=0, layer=0, component=0, token=0, head=1024, lane=0)


def test_a_pool_is_whole_when_every_element_was_written(pool: RankPool, placed: Placed) -> None:
    assert pool.wrong_bytes({}, {}) == []
    assert pool.wrong_bytes({1: placed.held}, {})
    pool.write(1, placed.held)
    assert pool.wrong_bytes({1: placed.held}, {}) == []
    assert pool.wrong_bytes({}, {1: placed.held}) == []
    assert pool.wrong_bytes({}, {})
    pool.wipe(placed.held)
    assert pool.wrong_bytes({}, {}) == []


def test_every_single_byte_is_looked_at(pool: RankPool, placed: Placed) -> None:
    pool.write(1, placed.held)
    memory = np.frombuffer(pool.memory.buffer, np.uint8)
    step = memory.size // 97
    for place in (0, GAP_BYTES - 1, GAP_BYTES, memory.size - 1, *range(1, memory.size, step)):
        memory[place] ^= 0x40
        assert pool.wrong_bytes({1: placed.held}, {})[0] == "1 bytes of 1 words are wrong"
        memory[place] ^= 0x40
    assert pool.wrong_bytes({1: placed.held}, {}) == []
    del memory


def test_a_fault_says_where_it_is_and_what_is_there(pool: RankPool, placed: Placed) -> None:
    pool.write(1, placed.held)
    region = pool.layout.regions[0]
    at = (region.base - pool.memory.address) // 8 + placed.held[0].pages[0] * region.page_stride // 8
    memory = np.frombuffer(pool.memory.buffer, np.uint64)
    memory[at + 8 * region.token_stride // 8] = words.words(room=1, layer=2, component=1, token=3, head=1, lane=0)[0]
    (_, fault) = pool.wrong_bytes({1: placed.held}, {})
    page = placed.held[0].pages[0]
    assert fault == (
        f"layer 0 'k' heads [0, 4), page {page}, element 8, local head 0, lane 0: "
        "room 1, layer 2 v, token 3, head 1, lane 0, not room 1, layer 0 k, token 8, head 0, lane 0"
    )
    del memory


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_ranks_of_a_source_together_send_each_token_as_often_as_they_should(case: Case) -> None:
    side, tokens = case.source, 101
    by_cp = {place.cp: pieces(side, place, tokens) for place in side.parallel.places()}
    sent = sorted(token for steps in by_cp.values() for step in steps for token in range(step.start, step.stop))
    times = side.parallel.cp if side.parallel.interleave else 1
    assert sent == sorted(list(range(tokens)) * times)
    assert all(steps[-1].stop == tokens for steps in by_cp.values())

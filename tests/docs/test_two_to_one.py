"""The program of docs/engine.md, as three processes at two addresses: what it hands over, and what it does if not."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .engine_helpers import Engine, engines, prefill_options, program, start_here

PAGE_TOKENS, TOKEN_BYTES = 16, 2 * 2 * 4 * 8 * 4  # layers, k and v, heads, lanes, bytes of a number
PREFILL, DECODE = "127.0.0.1", "127.0.0.2"
POOL = ["--pages", "14"]
RECEIVER = ["decode", "--host", DECODE, "--bootstrap-allow", PREFILL, "--pages", "12"]
ROOMS = itertools.count(1)

pytest.importorskip("torch", reason="the prefill ranks agree over torch")


class Three(NamedTuple):
    """Both prefill ranks and the decode engine."""

    first: Engine
    second: Engine
    decode: Engine

    @property
    def directory(self) -> str:
        return str(self.first.wait_for("ready")["bootstrap"])

    def request(self, tokens: list[int], *, adapter: str = "", to: str = "both") -> int:
        """Send a request, as a router does, and return its room."""
        room = next(ROOMS)
        if to in ("both", "prefill"):
            self.first.tell(room=room, tokens=tokens, adapter=adapter, bootstrap=self.directory)
        if to in ("both", "decode"):
            self.decode.tell(room=room, tokens=tokens, adapter=adapter, bootstrap=self.directory)
        return room

    def check(self, room: int, tokens: list[int]) -> int:
        """Wait until a request has arrived on the decode side, whole and right, and return the bytes that moved."""
        line = self.decode.wait_for("succeeded", room)
        assert line["cache"] == hashlib.sha256(program().compute(tokens, (0, 4)).tobytes()).hexdigest()
        assert line["first_token"] == sum(tokens) % 1000
        assert self.first.wait_for("succeeded", room) == self.second.wait_for("succeeded", room)
        self.decode.wait_for("released", room)
        return int(line["nbytes"])


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + number * 7) % 5003 for number in range(length)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    folder = tmp_path_factory.mktemp("engines")
    starts = [prefill_options(folder, 0, *POOL), prefill_options(folder, 1, *POOL), RECEIVER]
    with engines(folder, *((start_here, options) for options in starts)) as (first, second, decode):
        yield Three(first, second, decode)
        assert [engine.finish() for engine in (decode, first, second)] == [0, 0, 0]


@pytest.mark.parametrize("length", [1, 16, 47, 192], ids=lambda length: f"{length}-tokens")
def test_the_decode_side_gets_every_byte_of_both_ranks(three: Three, length: int) -> None:
    tokens = prompt(length, seed=length)
    room = three.request(tokens)
    assert three.check(room, tokens) == length * TOKEN_BYTES


def test_a_prefix_that_the_decode_engine_has_is_not_sent_again(three: Three) -> None:
    shared = prompt(40, seed=77)
    for end, moved in ((prompt(5, seed=1), 45), (prompt(30, seed=2), 70 - 2 * PAGE_TOKENS)):
        room = three.request(shared + end)
        assert three.check(room, shared + end) == moved * TOKEN_BYTES


def test_requests_that_the_pools_cannot_hold_at_once_wait_for_each_other(three: Three) -> None:
    prompts = [prompt(7 * PAGE_TOKENS, seed=seed) for seed in (5, 6, 7)]
    rooms = [three.request(tokens) for tokens in prompts]
    for room, tokens in zip(rooms, prompts, strict=True):
        three.check(room, tokens)


def test_a_request_that_the_prefill_engine_has_rejected_fails_on_the_decode_side_with_its_reason(three: Three) -> None:
    room = three.request(prompt(20, seed=3), adapter="german", to="prefill")
    assert three.first.wait_for("failed", room) == three.second.wait_for("failed", room)
    three.decode.tell(room=room, tokens=prompt(20, seed=3), adapter="german", bootstrap=three.directory)
    assert "there is no adapter 'german' here" in three.decode.wait_for("failed", room)["failed"]
    three.decode.wait_for("released", room)


def test_a_request_that_the_decode_engine_rejects_fails_on_both_prefill_ranks_with_its_reason(three: Three) -> None:
    room = three.request(prompt(13 * PAGE_TOKENS, seed=4))
    for engine in three:
        assert "the prompt needs 13 pages, the decode engine has 12" in engine.wait_for("failed", room)["failed"]
    three.first.wait_for("freed", room)


def test_two_prompts_with_one_room_number_are_told_apart(three: Three) -> None:
    room = three.request(prompt(20, seed=8), to="prefill")
    three.decode.tell(room=room, tokens=prompt(20, seed=9), bootstrap=three.directory)
    for engine in three:
        assert "different" in engine.wait_for("failed", room)["failed"]
    for engine, key in ((three.first, "freed"), (three.second, "freed"), (three.decode, "released")):
        engine.wait_for(key, room)


def test_a_directory_that_is_not_on_the_list_is_not_asked(three: Three) -> None:
    room = next(ROOMS)
    three.decode.tell(room=room, tokens=[1], bootstrap="10.1.2.3:8998")
    assert "10.1.2.3" in three.decode.wait_for("failed", room)["failed"]


def test_no_room_and_no_page_is_left_when_all_is_done(three: Three) -> None:
    tokens = prompt(PAGE_TOKENS, seed=10)
    three.check(three.request(tokens), tokens)
    for engine in three:
        assert engine.idle()["rooms"]["quarantined_pages"] == 0
    assert three.decode.idle()["free_pages"] == 12 - 1, "the request that ended last keeps its page"


def test_a_rank_that_dies_ends_its_engine_and_the_next_one_serves_the_same_decode_process(tmp_path: Path) -> None:
    options = [prefill_options(tmp_path, rank, *POOL) for rank in (0, 1)]
    with engines(tmp_path, *((start_here, one) for one in options), (start_here, RECEIVER)) as (first, second, decode):
        three = Three(first, second, decode)
        tokens = prompt(12 * PAGE_TOKENS, seed=11)  # all pages of the pool
        three.check(three.request(tokens), tokens)
        cut = three.request(prompt(12 * PAGE_TOKENS, seed=12), to="decode")
        decode.wait_for("offered", cut)
        second.popen.kill()
        assert "lost" in decode.wait_for("failed", cut)["failed"]
        decode.wait_for("released", cut)
        assert first.popen.wait(120) == 1
        assert "rank 1" in first.log.read_text()
        again = tmp_path / "again"
        again.mkdir()
        options = [prefill_options(again, rank, *POOL) for rank in (0, 1)]
        with engines(again, *((start_here, one) for one in options)) as (first, second):
            three = Three(first, second, decode)
            three.check(three.request(tokens), tokens)


def test_a_decode_engine_that_dies_ends_its_rooms_on_both_ranks(tmp_path: Path) -> None:
    options = [prefill_options(tmp_path, rank, *POOL) for rank in (0, 1)]
    with engines(tmp_path, *((start_here, one) for one in options), (start_here, RECEIVER)) as (first, second, decode):
        three = Three(first, second, decode)
        three.request(prompt(14 * PAGE_TOKENS, seed=13), to="prefill")  # takes all pages of the prefill engine
        cut = three.request(prompt(5, seed=14))  # and so this one waits, when the decode engine has offered its page
        for rank in (first, second):
            rank.wait_for_phase("READY")
        decode.popen.kill()
        for rank in (first, second):
            assert "lost" in rank.wait_for("failed", cut)["failed"]
            rank.wait_for("freed", cut)

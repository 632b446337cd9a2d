"""The identity of a request: its digests, and the failure of a room whose two sides were given different requests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.core import effects as do
from kvroom.core import inputs as asked
from kvroom.core.causes import Cause
from kvroom.core.identity import KVIdentity, mismatch
from kvroom.core.messages import Done, Offer, Peer, Quiesced
from kvroom.core.phases import KVPoll, Phase
from kvroom.core.settings import Timeouts
from kvroom.core.sink import Sink
from kvroom.core.source import Source
from kvroom.core.table import RoomTable
from kvroom.errors import LocalRoomError

TIMES = Timeouts(bootstrap_s=10, waiting_s=10, stall_s=10, drain_s=5)
PREFILL, DECODE, OTHER = Peer("prefill:1", 1), Peer("decode:1", 2), Peer("decode:2", 3)
REQUEST = KVIdentity.of(range(16), adapter="fr", cache_salt="a")
tokens_lists = st.lists(st.integers(0, 2**31 - 1), max_size=50)


# -- digests -----------------------------------------------------------------------------------------------------------


@given(tokens_lists, tokens_lists)
def test_identities_are_equal_exactly_where_the_tokens_are(one: list[int], other: list[int]) -> None:
    assert (KVIdentity.of(one) == KVIdentity.of(other)) == (one == other)
    assert (mismatch(KVIdentity.of(one), KVIdentity.of(other)) is None) == (one == other)


@pytest.mark.parametrize("kind", [tuple, np.array, lambda ids: np.array(ids, np.int32), lambda ids: array("q", ids)])
def test_every_sequence_of_the_same_tokens_has_the_same_identity(kind: Any) -> None:
    assert KVIdentity.of(kind([5, 0, 49151])) == KVIdentity.of([5, 0, 49151])


@pytest.mark.parametrize("tokens", [[1.0, 2.0], ["1"], "12", b"12", [[1], [2]], np.zeros((2, 2), int), 7])
def test_tokens_that_are_no_integers_are_refused(tokens: Any) -> None:
    with pytest.raises(LocalRoomError, match="expected a flat sequence of integer token ids"):
        KVIdentity.of(tokens)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("", "a"),
        (["a", "b"], ["ab"]),
        (["a", "b"], ["b", "a"]),
        (["a", ""], ["a"]),
        (["", "a"], ["a", ""]),
        ("\ud800", "\ud801"),
    ],
)
def test_fields_differ_where_their_texts_do(one: str | Sequence[str], other: str | Sequence[str]) -> None:
    assert mismatch(KVIdentity.of([1], salt=one), KVIdentity.of([1], salt=other)) is not None


def test_a_field_without_text_reads_none() -> None:
    assert [KVIdentity.of([1], images=value).get("images") for value in ("", [], [""])] == ["none"] * 3


@pytest.mark.parametrize("fields", [{"images": [1]}, {"x" * 65: "a"}, {f"f{n}": "a" for n in range(32)}])
def test_fields_that_cannot_travel_are_refused(fields: Any) -> None:
    with pytest.raises(LocalRoomError, match="an identity"):
        KVIdentity.of([1], **fields)


def test_a_salt_is_not_in_its_digest() -> None:
    assert "tenant-7" not in repr(KVIdentity.of([1], cache_salt="tenant-7"))


def test_a_field_that_one_side_does_not_state_is_not_compared() -> None:
    plain, named = KVIdentity.of([1, 2]), KVIdentity.of([1, 2], adapter="fr", cache_salt=None)
    assert mismatch(plain, named) is mismatch(named, plain) is None
    assert named.shared(plain) == ("tokens",)
    assert named.get("cache_salt") is None


@pytest.mark.parametrize(("prefill", "decode"), [(KVIdentity(), REQUEST), (REQUEST, KVIdentity()), (KVIdentity(),) * 2])
def test_tokens_must_be_stated_by_both(prefill: KVIdentity, decode: KVIdentity) -> None:
    assert "tokens is" in str(mismatch(prefill, decode))
    assert "not stated" in str(mismatch(prefill, decode))


# -- rooms -------------------------------------------------------------------------------------------------------------


class Side:
    """A table with linked peers, and the messages of its rooms."""

    def __init__(self) -> None:
        self.table = RoomTable(TIMES)
        self.seq = 0
        for peer in (PREFILL, DECODE, OTHER):
            self.table.peer_up(peer, 0.0)

    def hear(self, peer: Peer, message: Any) -> None:
        self.seq += 1
        self.table.receive(peer, self.seq, message, 0.0)

    def done(self) -> list[do.Effect]:
        """Return the effects since the last call, without reports."""
        return [effect for _, effect in self.table.take_effects() if not isinstance(effect, do.Report)]


def offer(identity: KVIdentity, generation: int = 70, sinks: int = 1) -> Offer:
    return Offer(room=7, generation=generation, start=0, stop=16, pages=(3,), identity=identity, sinks=sinks)


SAME_LENGTH = KVIdentity.of([*range(15), 99], adapter="fr", cache_salt="a")
OTHER_SALT = KVIdentity.of(range(16), adapter="fr", cache_salt="b")
OTHER_ADAPTER = KVIdentity.of(range(16), adapter="", cache_salt="a")
WRONG = {"tokens": SAME_LENGTH, "cache_salt": OTHER_SALT, "adapter": OTHER_ADAPTER}


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("order", ["stated, sent, offered", "stated, offered, sent", "offered, stated, sent"])
def test_a_source_writes_nothing_for_another_request(field: str, order: str) -> None:
    side, room = Side(), Source(TIMES)
    side.table.open(room, 7, None, 0.0)
    for step in order.split(", "):
        if step == "stated":
            side.table.feed(room, asked.Identify(identity=REQUEST), 0.0)
        elif step == "sent":
            side.table.feed(room, asked.SendPages(pages=(1,), stop=16, last=True), 0.0)
        else:
            side.hear(DECODE, offer(WRONG[field]))
    assert (room.phase, room.status) == (Phase.RELEASED, KVPoll.Failed)
    effects = side.done()
    assert not any(isinstance(effect, do.Submit) for effect in effects)
    assert room.failure is not None
    assert room.failure.cause is Cause.IDENTITY
    said = {
        "tokens": "tokens is 16 ids on the prefill side and another (16 ids) on the decode side",
        "cache_salt": "cache_salt is set on the prefill side and another (set) on the decode side",
        "adapter": "adapter is set on the prefill side and none on the decode side",
    }
    assert said[field] in room.failure.detail
    assert (
        do.Send(peer=DECODE, message=Quiesced(room=7, generation=70, failure=room.failure)) in effects
    )  # so the decode side tells the same
    side.table.feed(room, asked.Clear(), 0.0)
    assert side.table.audit().sources == 0


def test_one_of_two_sinks_that_asks_for_another_request_fails_both() -> None:
    side, room = Side(), Source(TIMES, identity=REQUEST)
    side.table.open(room, 7, None, 0.0)
    side.hear(DECODE, offer(REQUEST, 70, sinks=2))
    side.hear(OTHER, offer(SAME_LENGTH, 71, sinks=2))
    assert room.phase is Phase.RELEASED
    told = [effect for effect in side.done() if isinstance(effect, do.Send)]
    assert {(one.peer, one.message.generation) for one in told} == {(DECODE, 70), (OTHER, 71)}


@pytest.mark.parametrize("field", WRONG)
def test_a_sink_does_not_succeed_with_another_request(field: str) -> None:
    side, room = Side(), Sink(TIMES, identity=REQUEST)
    side.table.open(room, 7, 70, 0.0)
    side.table.feed(room, asked.OfferPages(pages=(3,), start=0, stop=16, nbytes=64), 0.0)
    side.table.feed(room, asked.Resolved(sources=(PREFILL,)), 0.0)
    side.hear(PREFILL, Done(room=7, generation=70, tokens=16, nbytes=64, identity=WRONG[field]))
    assert (room.status, room.phase) == (KVPoll.Failed, Phase.RELEASED)
    assert room.failure is not None
    assert (room.failure.cause, room.failure.peer) == (Cause.IDENTITY, str(PREFILL))


def test_pages_are_neither_offered_nor_sent_before_the_request_is_stated() -> None:
    side, source, sink = Side(), Source(TIMES), Sink(TIMES)
    side.table.open(source, 7, None, 0.0)
    side.table.open(sink, 7, 70, 0.0)
    with pytest.raises(LocalRoomError, match="state the identity of the request first"):
        side.table.feed(source, asked.SendPages(pages=(1,), stop=16, last=True), 0.0)
    with pytest.raises(LocalRoomError, match="state the identity of the request first"):
        side.table.feed(sink, asked.OfferPages(pages=(3,), start=0, stop=16, nbytes=64), 0.0)
    for room in (source, sink):
        side.table.feed(room, asked.Identify(identity=REQUEST), 0.0)
        side.table.feed(room, asked.Identify(identity=REQUEST), 0.0)
        with pytest.raises(LocalRoomError, match="another identity was stated already"):
            side.table.feed(room, asked.Identify(identity=SAME_LENGTH), 0.0)
        with pytest.raises(LocalRoomError, match="has no tokens"):
            side.table.feed(room, asked.Identify(identity=KVIdentity()), 0.0)
        assert room.identity == REQUEST


def test_both_sides_know_what_the_other_has_stated() -> None:
    side, source, sink = Side(), Source(TIMES, identity=REQUEST), Sink(TIMES, identity=REQUEST)
    named = KVIdentity.of(range(16), adapter="fr")
    side.table.open(source, 7, None, 0.0)
    side.table.open(sink, 8, 80, 0.0)
    assert {source.peer_identity, sink.peer_identity} == {None}
    side.hear(DECODE, offer(named))
    side.table.feed(sink, asked.OfferPages(pages=(3,), start=0, stop=16, nbytes=64), 0.0)
    side.table.feed(sink, asked.Resolved(sources=(PREFILL,)), 0.0)
    side.hear(PREFILL, Done(room=8, generation=80, tokens=16, nbytes=64, identity=named))
    assert source.peer_identity == sink.peer_identity == named
    assert sink.phase is Phase.LANDED

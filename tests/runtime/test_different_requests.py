"""Two managers whose engines received different requests under one room number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from manager_helpers import Pair

from kvroom import KVIdentity, KVPoll, LocalRoomError, RoomFailed

REQUEST = KVIdentity.of(range(8), adapter="fr", cache_salt="a")


@pytest.fixture(params=["memory", "tcp", "local"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(request.param, stack)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("tokens", KVIdentity.of([0, 1, 2, 3, 4, 5, 6, 99], adapter="fr", cache_salt="a")),
        ("adapter", KVIdentity.of(range(8), adapter="de", cache_salt="a")),
        ("cache_salt", KVIdentity.of(range(8), adapter="fr", cache_salt="b")),
    ],
)
def test_different_requests_fail_both_sides_with_one_sentence(pair: Pair, field: str, other: KVIdentity) -> None:
    before = pair.sink_pool.array.copy()
    with (
        pair.prefill.sender(7, identity=REQUEST) as sender,
        pair.decode.receiver(pair.addr, 7, identity=other) as receiver,
    ):
        sender.send([5, 6], stop=8, last=True)
        receiver.send_metadata([9, 2], tokens=8)
        texts = []
        for handle in (sender, receiver):
            with pytest.raises(RoomFailed) as failed:
                handle.wait(10)
            texts.append(str(failed.value))
        assert receiver.released
    assert texts[0] == texts[1]
    value = "8 ids" if field == "tokens" else "set"
    assert f"{field} is {value} on the prefill side and another ({value}) on the decode side" in texts[0]
    for digest in (REQUEST.get(field), other.get(field)):
        assert digest is not None
        assert digest.rpartition(":")[2] not in texts[0]  # a client could test its guess of a prompt
    assert (pair.sink_pool.array == before).all()
    for request in (REQUEST, other):  # valid requests, one after another, with the number that was misused
        with (
            pair.prefill.sender(7, identity=request) as sender,
            pair.decode.receiver(pair.addr, 7, identity=request) as receiver,
        ):
            sender.send([5, 6], stop=8, last=True)
            receiver.send_metadata([9, 2], tokens=8)
            assert receiver.wait(10).compared == sender.wait(10).compared == ("adapter", "cache_salt", "tokens")
    pair.check_clean()


def test_an_identity_may_be_stated_after_the_room_was_opened(pair: Pair) -> None:
    with pair.prefill.sender(7) as sender, pair.decode.receiver(pair.addr, 7) as receiver:
        with pytest.raises(LocalRoomError, match=r"room 7 has no identity: .*=KVIdentity.of\(token_ids\)"):
            sender.send([5], stop=4)
        with pytest.raises(LocalRoomError, match="room 7 has no identity"):
            receiver.send_metadata([9], tokens=4)
        receiver.identify(REQUEST)
        receiver.send_metadata([9], tokens=4)
        pair.until(lambda: sender.poll() is KVPoll.WaitingForInput)
        (view,) = pair.prefill.room(7)
        assert (view.identity, view.peer_identity) == ({}, dict(REQUEST.fields))
        sender.identify(REQUEST)
        sender.identify(REQUEST)
        with pytest.raises(LocalRoomError, match="another identity was stated"):
            sender.identify(KVIdentity.of([1]))
        with pytest.raises(LocalRoomError, match=r"give KVIdentity.of\(token_ids\)"):
            sender.identify(KVIdentity())
        sender.send([5], stop=4, last=True)
        assert receiver.wait(10).compared == ("adapter", "cache_salt", "tokens")
    pair.check_clean()


def test_an_engine_that_cannot_name_its_adapter_takes_part(pair: Pair) -> None:
    with (
        pair.prefill.sender(7, identity=KVIdentity.of(range(8), cache_salt="a")) as sender,
        pair.decode.receiver(pair.addr, 7, identity=REQUEST) as receiver,
    ):
        sender.send([5, 6], stop=8, last=True)
        receiver.send_metadata([9, 2], tokens=8)
        assert receiver.wait(10).compared == sender.wait(10).compared == ("cache_salt", "tokens")
    pair.check_clean()


@pytest.mark.parametrize("identity", [b"digest", "digest", 7, ("tokens", "x"), [("tokens", "x")]])
def test_what_is_no_identity_is_refused_at_the_call(pair: Pair, identity: object) -> None:
    with pytest.raises(LocalRoomError, match=r"give KVIdentity.of\(token_ids\)"):
        pair.prefill.sender(7, identity=identity)  # type: ignore[arg-type]
    with pytest.raises(LocalRoomError, match=r"give KVIdentity.of\(token_ids\)"):
        pair.decode.receiver(pair.addr, 7, identity=identity)  # type: ignore[arg-type]
    pair.check_clean()

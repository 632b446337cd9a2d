"""A peer that has the secret and lies about everything else ends its own link, and no other room or link.

The managers and sockets are real. A room is half done while the hostile peer links, and succeeds after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import msgspec
import pytest
from answering import directory
from link_helpers import Recorder
from manager_helpers import Pair

from identities import PROMPT
from kvroom import KVManager, KVPoll, RoomFailed
from kvroom.bootstrap import client
from kvroom.core.causes import Cause
from kvroom.core.counts import Ending
from kvroom.core.messages import Offer, Peer, Window
from kvroom.core.phases import Side
from kvroom.errors import LinkError
from kvroom.plan import Extents
from kvroom.runtime.link import Links
from kvroom.runtime.remote import PeerProfile, identities
from kvroom.transports import create, probe
from kvroom.transports.kit import claims
from kvroom.transports.kit.machine import Process
from kvroom.transports.kit.ranges import u64
from kvroom.transports.onesided.engine import engine_name
from kvroom.wire.keys import RunKey, SigningKey, is_signed
from kvroom_lab.pools import TestPool

SECRET = b"known to the hostile peer, too"
WAIT_S = 20.0
INTERNAL = Ending(Side.SOURCE, Cause.INTERNAL)

TRANSPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "memory": ("memory", {}),
    "fake": ("fake", {}),
    "tcp": ("tcp", {}),
    "local-vm": ("local", {"mode": "vm"}),
    "local-auto": ("local", {}),
    "auto": ("auto", {}),
    "nixl": ("nixl", {}),
    "mooncake": ("mooncake", {"trusted_fabric": True}),
    "ascend-double": (
        "ascend",
        {"part": "kvroom_lab.doubles.memfabric_hybrid", "data_op_type": "HOST_RDMA", "trusted_fabric": True},
    ),
    "mori-double": ("mori", {"part": "kvroom_lab.doubles.mori_io", "trusted_fabric": True}),
}
UNREADABLE = {
    "empty": b"",
    "not UTF-8": b"\x85\xa1\xff",
    "not UTF-8 in the tag": b"\x81\xa4type\xa1\xff",
    "not a map": b"\xc0",
    "deep": b"\x91" * 100_000,
    "a list of 2^32 elements": b"\xdd\xff\xff\xff\xff",
    "a tag that is a number": b"\x81\xa4type\xcf" + b"\xff" * 8,
    "a time that there is not": b"\x81\xa4type\xc7\x0c\xff" + b"\xff" * 12,
}
NUMBERS = (-1, 0, 2**31, 2**63, 2**64 - 1)
TEXTS = ("", "\x00", "\u202e\ud7ff\U0010ffff" * 40, "." * 300, "cuda:99999999999999999999", "256.256.256.256")
BYTES = (b"", b"\xff", b"\x00" * 70_000)
Stated = Callable[[int], bytes]
"""Returns the identity message that a peer of this incarnation sends when its link is up."""


T = TypeVar("T")


def saying(identity: bytes) -> Stated:
    """Return an identity message that is the same for every incarnation."""
    return lambda _: identity


class World:
    """A pair of managers with a half-done room between them, while a hostile peer links to one or the other."""

    def __init__(self, stack: contextlib.ExitStack, transport: str, *, linked: bool = True) -> None:
        """Start the pair. `linked`: the two are linked before the hostile peer comes."""
        name, settings = TRANSPORTS[transport]
        self.pair = Pair(name, stack, settings=settings, secret=SECRET)
        self.managers = self.pair.prefill, self.pair.decode
        self.rooms = itertools.count(1)
        with self.bystanders() if linked else contextlib.nullcontext():  # a room that ends has linked the two
            asyncio.run(self._learn())

    async def _learn(self) -> None:
        async with linked_to(self.pair.prefill, saying(b"\xc0")) as (_, recorder):
            up = await recorder.next("up")
            self.honest = identities.decode(up[2])  # type: ignore[arg-type]
            self.description = stated_in(self.honest.description)
            assert "sent an invalid description of itself" in await recorder.detail()

    @contextlib.contextmanager
    def bystanders(self) -> Iterator[None]:
        """Hand over half of a room, and the rest after the block."""
        pair, number = self.pair, next(self.rooms)
        before = [manager.counters() for manager in self.managers]
        with pair.sender(number) as sender, pair.receiver(number) as receiver:
            receiver.send_metadata([1, 2], tokens=8)
            sender.send([3], stop=4)
            pair.until(lambda: receiver.poll() is KVPoll.Transferring)
            yield
            assert (sender.poll(), receiver.poll()) == (KVPoll.Transferring, KVPoll.Transferring)
            sender.send([4], stop=8, last=True)
            receiver.wait(WAIT_S)
            sender.wait(WAIT_S)
        for manager, counted in zip(self.managers, before, strict=True):
            assert manager.counters().ended.get(INTERNAL, 0) == counted.ended.get(INTERNAL, 0)

    def claimed(self, claim: bytes) -> Stated:
        """Return an identity message that differs from the prefill side's only in this claim."""
        return saying(msgspec.msgpack.encode(msgspec.structs.replace(self.honest, description=claim)))

    def signed(self, description: bytes, key: SigningKey) -> Stated:
        """Return the identity message of a peer with this description, signed with this key."""
        name = self.honest.transport
        return lambda run: self.claimed(claims.signed(description, key, name, claims.run_owner(run)))(run)

    def described(self, description: bytes) -> Stated:
        """Return the identity message of a peer with this description, but its own key in place of the honest key."""
        own, theirs = SigningKey(), msgspec.msgpack.decode(self.description)["endpoint"]
        return self.signed(adopted(description, theirs, own), own)

    def link(self, manager: KVManager, stated: Stated) -> str | None:
        """Link with this identity; return why the manager ended the link, or None if the link stays."""
        return asyncio.run(self._link(manager, stated))

    async def _link(self, manager: KVManager, stated: Stated) -> str | None:
        async with linked_to(manager, stated) as (links, recorder):
            await recorder.next("up")
            if await asyncio.wait_for(stands(manager, links.me, recorder), WAIT_S):
                return None
            return await recorder.detail()

    async def hand_over_beside(self, stated: Stated) -> str | None:
        """Hand a room over while this peer is linked to the decode side, or refused; return the reason of a refusal."""
        manager, detail = self.pair.decode, None
        async with linked_to(manager, stated) as (links, recorder):
            await recorder.next("up")
            if not await asyncio.wait_for(stands(manager, links.me, recorder), WAIT_S):
                detail = await recorder.detail()
            await asyncio.to_thread(self.hand_over)
            assert (recorder.events[-1][0] == "up") is (detail is None)
        return detail

    def hand_over(self) -> None:
        """Hand a room over."""
        with self.bystanders():
            pass

    async def offer(self, identity: Stated, offer: Offer) -> None:
        """Let a room of the prefill side take this offer and send its pages; return once the offer was answered."""
        async with linked_to(self.pair.prefill, identity) as (links, recorder):
            await recorder.next("up")
            with self.pair.sender(offer.room) as sender:
                assert links.send(self.pair.prefill.me, offer)
                await asyncio.to_thread(self.pair.until, lambda: sender.poll() is KVPoll.WaitingForInput)
                sender.send([0], stop=4, last=True)
                while recorder.events[-1][0] == "up":
                    await asyncio.sleep(0)


async def stands(manager: KVManager, peer: Peer, recorder: Recorder) -> bool:
    """Wait until the manager has ended the link, or the peer is reached, cannot be reached now, or does not fit."""
    while recorder.events[-1][0] != "lost":
        remote = manager.driver.peers.remotes.get(peer)
        if remote is not None and (remote.handle or remote.again_s or remote.planner is None):
            return True
        await asyncio.sleep(0)  # other tasks run: the event comes from a thread or a socket
    return False


@contextlib.asynccontextmanager
async def linked_to(manager: KVManager, stated: Stated) -> AsyncIterator[tuple[Links, Recorder]]:
    """Open the links of a hostile peer that has dialled this manager."""
    recorder, key = Recorder(), RunKey()
    while key.incarnation > manager.me.incarnation:  # the side with the lower incarnation opens the link
        key = RunKey()
    links = Links(recorder, identity=stated(key.incarnation), secret=SECRET, key=key)
    await links.start()
    try:
        with contextlib.suppress(LinkError):  # the manager has ended the link already; the recorder has the reason
            await links.dial(manager.address)
        yield links, recorder
    finally:
        await links.close()


def stated_in(claim: bytes) -> bytes:
    """Return the description of this claim."""
    return msgspec.msgpack.decode(claim, type=claims.SignedDescription).description


def adopted(description: bytes, theirs: bytes, own: SigningKey) -> bytes:
    """Return the description with this key in place of theirs, and the parts of an `auto` signed with it."""
    mine = description.replace(theirs, own.public)
    mine = mine.replace(engine_name(theirs).encode(), engine_name(own.public).encode())
    described = read_as(dict, mine)
    parts = described.get("parts")
    if not isinstance(parts, dict):
        return mine
    for name, claim in parts.items():
        part = stated_in(claim) if isinstance(claim, bytes) and read_as(list, claim) else b""
        endpoint = read_as(dict, part).get("endpoint")
        if isinstance(name, str) and isinstance(endpoint, bytes) and len(endpoint) == len(own.public):
            parts[name] = claims.signed(adopted(part, endpoint, own), own, name, own.public)
    return msgspec.msgpack.encode(described)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every number, text and byte string of decoded msgpack, with the path to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))
    if not isinstance(value, dict | list) and value is not None:
        yield path, value


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of decoded msgpack with another value at this path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def lies(description: bytes) -> Iterator[bytes]:
    """Yield descriptions with one value that is odd, or of another type, including nested descriptions."""
    honest = msgspec.msgpack.decode(description)
    for path, value in leaves(honest):
        if isinstance(value, bytes):
            odd: list[Any] = [*BYTES]
            if path[-1] == "engine" and read_as(dict, value):
                odd += lies(value)
            elif path[0] == "parts":
                odd += [msgspec.msgpack.encode(claims.SignedDescription(lie, b"")) for lie in lies(stated_in(value))]
        else:
            odd = [*(NUMBERS if isinstance(value, int) else TEXTS)]
        for new in (*odd, None, [], {"a": 1}):
            yield msgspec.msgpack.encode(changed(honest, path, new))


def read_as(kind: type[T], raw: bytes) -> T:
    """Return the decoded msgpack, or an empty value of this kind if it is of another kind."""
    try:
        value = msgspec.msgpack.decode(raw)
    except msgspec.DecodeError:
        return kind()
    return value if isinstance(value, kind) else kind()


FORGED = (1).to_bytes(32, "little") + bytes(32)
"""A signature of 32 bytes R, a point, and 32 bytes S, a number."""


def skip_without(transport: str) -> None:
    name, _ = TRANSPORTS[transport]
    missing = () if transport.endswith("-double") else probe(name).missing
    if missing:
        pytest.skip(f"{name} cannot run here: {missing[0].what}")


@pytest.fixture(scope="module", params=TRANSPORTS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    skip_without(request.param)
    with contextlib.ExitStack() as stack:
        yield World(stack, request.param)


@pytest.mark.sampled(together="world", least=3)
@pytest.mark.parametrize("side", [0, 1], ids=["prefill", "decode"])
def test_a_description_that_cannot_be_read_ends_the_link_and_nothing_else(world: World, side: int) -> None:
    honest, own = world.honest.description, SigningKey()
    bare = msgspec.msgpack.encode({"type": "", "endpoint": own.public})
    with world.bystanders():
        for name, raw in {**UNREADABLE, "cut": honest[: len(honest) // 2], "nothing but a key": bare}.items():
            for stated in (world.claimed(raw), world.signed(raw, own)):
                detail = world.link(world.managers[side], stated)
                assert detail is not None, name
                assert "cannot be used: " in detail
                assert "description is malformed" in detail


@pytest.mark.sampled(least=3)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_description_with_a_lie_in_it_touches_nobody_else(transport: str) -> None:
    """A few of them at a time, because managers check every lost peer whenever another one links."""
    skip_without(transport)
    causes: list[str | None] = []
    before = -1
    while before < len(causes):
        before = len(causes)
        with contextlib.ExitStack() as stack:
            world = World(stack, transport)
            some = itertools.islice(lies(world.description), before, before + 40)
            with world.bystanders():
                for manager, raw in zip(itertools.cycle(world.managers), some, strict=False):
                    causes.append(world.link(manager, world.described(raw)))
    ended = [detail for detail in causes if detail is not None]
    assert ended
    assert all("cannot be used: " in detail for detail in ended)


def false_claims(world: World) -> Iterator[Stated]:
    """Yield the honest claim, its description with a wrong signature, and a part of it in another description."""
    own = SigningKey()
    yield world.claimed(world.honest.description)
    yield world.signed(world.description, own)
    if world.honest.transport == "auto":
        for name, part in msgspec.msgpack.decode(world.description)["parts"].items():
            described = {"type": "auto", "endpoint": own.public, "parts": {name: part}}
            yield world.signed(msgspec.msgpack.encode(described), own)


@pytest.mark.sampled(least=4)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_states_the_description_of_another_first_keeps_none_of_its_rooms_out(
    transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own link ends, with one sentence that both sides receive."""
    with contextlib.ExitStack() as stack:
        skip_without(transport)
        world = World(stack, transport, linked=False)
        for stated in false_claims(world):
            caplog.clear()
            detail = asyncio.run(world.hand_over_beside(stated))
            assert detail is not None
            assert "description is not signed for this peer by the key that it names" in detail
            assert detail[detail.index("how its transport") :] in caplog.text


def beside_the_engine_of(world: World) -> Iterator[tuple[str, Stated]]:
    """Yield descriptions with the honest peer's engine in them: under its name, under another, and elsewhere."""
    own = SigningKey()
    honest = msgspec.msgpack.decode(world.description)
    named = {**honest, "endpoint": own.public}
    yield "under its own name", world.signed(msgspec.msgpack.encode(named), own)
    yield "under another name", world.described(world.description)
    elsewhere = {**honest, "process": {**honest["process"], "boot": "another"}}
    yield "on another machine", world.described(msgspec.msgpack.encode(elsewhere))


@pytest.mark.sampled(least=2)
@pytest.mark.parametrize("transport", ["nixl", "mooncake", "ascend-double", "mori-double"])
def test_a_peer_that_states_the_engine_of_another_keeps_none_of_its_rooms_out(transport: str) -> None:
    """Only the name of an engine is proven: rooms go on while that peer is linked, and after it has left."""
    skip_without(transport)
    for linked in (False, True):
        with contextlib.ExitStack() as stack:
            world = World(stack, transport, linked=linked)
            for how, stated in beside_the_engine_of(world):
                detail = asyncio.run(world.hand_over_beside(stated))
                refused = how == "under its own name" and transport in ("nixl", "mori-double")
                assert (detail is not None) is refused, (how, detail)
                assert detail is None or "another agent" in detail or "of another peer" in detail
                world.hand_over()


@pytest.fixture(scope="module")
def plain() -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(stack, "tcp")


def test_an_identity_with_a_lie_in_it_touches_nobody_else(plain: World) -> None:
    honest = msgspec.msgpack.decode(msgspec.msgpack.encode(plain.honest))
    with plain.bystanders():
        for path, value in leaves(honest["layout"]):
            odd: tuple[Any, ...] = NUMBERS if isinstance(value, int) else TEXTS
            for new in (*odd, None, [], {"a": 1}):
                lie = {**honest, "layout": changed(honest["layout"], path, new)}
                detail = plain.link(plain.pair.decode, saying(msgspec.msgpack.encode(lie)))
                assert detail is None or "cannot be used" in detail or "invalid description" in detail


@pytest.mark.parametrize(
    "identity",
    [b"", b"\xc0", b"\x83\xa6layout\x82\xa7regions\x94\x8b\xa5layer\x00\xa9component\xa1\xff", b"\x91" * 100_000],
)
def test_an_identity_that_cannot_be_read_is_one_error(plain: World, identity: bytes) -> None:
    with plain.bystanders():
        detail = plain.link(plain.pair.prefill, saying(identity))
    assert detail is not None
    assert "sent an invalid description of itself" in detail


HUGE = 2**63 - 1
PLAIN = Offer(room=0, generation=1, start=0, stop=4, pages=(0,), identity=PROMPT)
OFFERS: dict[str, dict[str, Any]] = {
    "a grant that is not UTF-8": {"grant": b"\x81\xa1\xff\xc4\x00"},
    "a grant that is nested deeply": {"grant": b"\x91" * 4096},
    "a grant of another type": {"grant": b"\x81\xa3tcp\x01"},
    "no page": {"pages": ()},
    "a page far outside": {"pages": (2**32 - 1,)},
    "pages without end": {"pages": tuple(range(200_000))},
    "a window that begins after its end": {"start": HUGE, "stop": 4},
    "tokens that begin far outside": {"start": HUGE, "stop": HUGE, "tokens": 4},
    "more tokens than there are": {"stop": HUGE},
    "a request of very many tokens": {"tokens": HUGE},
    "a window of an unknown group": {"windows": (Window("\ud7ff", (2**32 - 1,)),)},
    "a window of the main group": {"windows": (Window("", (1,)),)},
    "parts far outside": {"parts": ((0, HUGE, 0, HUGE),)},
    "parts that begin after their end": {"parts": ((HUGE, 0, HUGE, 0),)},
    "nothing to write, and parts far outside": {"start": 4, "checksum": True, "parts": ((HUGE, HUGE, 0, 1),)},
    "nothing to write, and a part with no head": {"start": 4, "checksum": True, "parts": ((0, 1, 1, 1),)},
    "a checksum over pages that are too few": {"checksum": True, "pages": ()},
    "a checksum over tokens far outside": {"start": HUGE, "stop": HUGE, "tokens": 4, "checksum": True},
}


@pytest.mark.sampled(least=2)
@pytest.mark.parametrize("transport", ["memory", "tcp", "local-auto", "auto"])  # the bug would be in their common parts
def test_an_offer_with_odd_numbers_touches_nobody_else(transport: str) -> None:
    name, settings = TRANSPORTS[transport]
    with contextlib.ExitStack() as stack:
        world, pool, own = World(stack, transport), TestPool(), create(name, **settings)
        stack.callback(pool.close)
        stack.callback(own.close)
        own.register(pool.layout.memory())
        mine = PeerProfile(pool.layout, own.name, b"", Process.current())

        def stated(incarnation: int) -> bytes:
            claim = claims.state(own, claims.run_owner(incarnation))
            return msgspec.msgpack.encode(msgspec.structs.replace(mine, description=claim))

        with world.bystanders():
            extents = Extents(u64([pool.memory.address]), u64([pool.memory.nbytes]))
            plain = msgspec.structs.replace(PLAIN, grant=own.grant(extents))
            for odd in OFFERS.values():
                if transport == "memory" and "grant" in odd:
                    continue  # it accepts any bytes as a revoked grant, and waits for the reason
                offer = msgspec.structs.replace(plain, room=next(world.rooms), **odd)
                asyncio.run(asyncio.wait_for(world.offer(stated, offer), WAIT_S))


@pytest.mark.parametrize("transport", ["tcp", "auto"])
@pytest.mark.parametrize("point", [0, 1, 2**255 - 20])
def test_a_public_key_of_low_order_ends_its_own_link_only(transport: str, point: int) -> None:
    """Without a private key one can find descriptions for which such a key accepts a signature that anyone can make."""
    with contextlib.ExitStack() as stack:
        world = World(stack, transport)
        key = point.to_bytes(32, "little")

        def stated(run: int) -> bytes:
            if transport == "tcp":
                return world.claimed(forged(key, "tcp", claims.run_owner(run)))(run)
            own = SigningKey()
            parts = {"tcp": forged(key, "tcp", own.public)}
            described = msgspec.msgpack.encode({"type": "auto", "endpoint": own.public, "parts": parts})
            return world.signed(described, own)(run)

        with world.bystanders():
            for manager in world.managers:
                assert "a public key of low order" in str(world.link(manager, stated))


def forged(key: bytes, transport: str, owner: bytes) -> bytes:
    """Return a claim of this key of low order: R is the neutral element, S is 0.

    That is valid for every fourth hash.
    """

    class Forger(SigningKey):
        def sign(self, label: bytes, transcript: bytes) -> bytes:
            self.good = is_signed(FORGED, key, label, transcript)
            return FORGED

    forger = Forger()
    for port in range(1, 1000):
        described = {"type": "tcp", "host": "127.0.0.1", "port": port, "endpoint": key}
        claim = claims.signed(msgspec.msgpack.encode(described), forger, transport, owner)
        if forger.good:
            return claim
    raise AssertionError(f"no signature of {key.hex()} was found")


RANK: dict[str, object] = {"rank_ip": "127.0.0.1", "rank_port": 9, "page_size": 4}


def listing(rank: dict[str, object]) -> bytes:
    return msgspec.json.encode({"ranks": [rank]})


ANSWERS = {
    "not UTF-8": b'{"ranks":[{"rank_ip":"\xff"}]}',
    "half of a surrogate pair": b'{"ranks":[{"rank_ip":"\\ud800","rank_port":9,"page_size":4}]}',
    "deep": b"[" * 100_000,
    "a number without end": b'{"ranks":[{"rank_ip":"127.0.0.1","rank_port":1' + b"0" * 5000 + b"}]}",
    "a port too high": listing({**RANK, "rank_port": 2**16}),
    "a host that is none": listing({**RANK, "rank_ip": "." * 253}),
    "stages that are none": listing({**RANK, "stages": [-(2**63)]}),
    "heads without end": listing({**RANK, "kv_heads": 2**64 - 1}),
}


def fail_of(world: World, addr: str) -> str:
    """Let a room of the decode side look for its sources there; return why it failed."""
    with (
        world.pair.decode.receiver(addr, next(world.rooms), identity=PROMPT) as receiver,
        pytest.raises(RoomFailed) as failed,
    ):
        receiver.wait(WAIT_S)
    return str(failed.value)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_directory_with_an_odd_answer_fails_its_room_and_nothing_else(plain: World, answer: str) -> None:
    with plain.bystanders(), directory(ANSWERS[answer], SECRET) as addr:
        assert f"unexpected answer from bootstrap directory {addr}" in fail_of(plain, addr)


def test_an_answer_that_raises_what_nobody_thought_of_fails_its_room_and_nothing_else(
    plain: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*_: object) -> None:
        raise OverflowError("int too large to convert")

    monkeypatch.setattr(client, "check_complete", overflows)
    with plain.bystanders(), directory(listing(RANK), SECRET) as addr:
        assert (
            f"invalid list of ranks from the directory at {addr}: OverflowError: int too large to convert"
            in fail_of(plain, addr)
        )

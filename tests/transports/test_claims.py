"""A description is valid only for the run that states it, and only with the private key that belongs to its key."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from transport_helpers import Side

from kvroom.transports.base import MalformedDescription, Transport
from kvroom.transports.fake import FakeTransport
from kvroom.transports.kit import claims
from kvroom.transports.kit.data_keys import InstanceKey, to_x25519
from kvroom.transports.memory import MemoryTransport
from kvroom.transports.selection.auto import AutoTransport
from kvroom.transports.tcp import TcpTransport
from kvroom.wire.keys import RunKey, SigningKey

RUN, OTHER_RUN = (claims.run_owner(RunKey().incarnation) for _ in range(2))
NOT_SIGNED = "description is not signed for this peer by the key that it names"


def auto() -> AutoTransport:
    return AutoTransport(candidates=[MemoryTransport()])


@pytest.fixture(params=[MemoryTransport, FakeTransport, TcpTransport, auto])
def side(request: pytest.FixtureRequest) -> Iterator[Side[Transport]]:
    with Side(request.param(), 1) as side:
        yield side


def test_what_a_run_states_is_read_for_that_run_alone(side: Side[Transport]) -> None:
    transport = side.transport
    claim = claims.state(transport, RUN)
    assert claims.read(claim, transport.name, RUN) == transport.describe()
    for owner in (OTHER_RUN, b"", RUN + b"\x00", RUN[1:], claims.run_owner(0), claims.run_owner(2**64 - 1)):
        with pytest.raises(MalformedDescription, match=NOT_SIGNED):
            claims.read(claim, transport.name, owner)


@pytest.mark.parametrize("name", ["tcp2", "", "tc", "auto"])
def test_a_claim_is_of_one_kind_of_transport(name: str) -> None:
    key = SigningKey()
    claim = claims.signed(msgspec.msgpack.encode({"endpoint": key.public}), key, "tcp", RUN)
    with pytest.raises(MalformedDescription, match=f"{name}: the peer's {NOT_SIGNED}"):
        claims.read(claim, name, RUN)


def test_no_byte_can_move_between_what_is_signed() -> None:
    """Name, owner and description are signed with their lengths, so that no other split of them has this signature."""
    key = SigningKey()
    inner = msgspec.msgpack.encode({"endpoint": key.public})
    outer = msgspec.msgpack.encode({"endpoint": key.public, "more": {"endpoint": key.public}})
    head = outer.removesuffix(inner)
    for of, name, owner in ((outer, "tcp", RUN), (inner, "tcp", RUN + head), (inner, "tc", b"p" + RUN)):
        signature = msgspec.msgpack.decode(claims.signed(of, key, name, owner), type=claims.SignedDescription).signature
        for other, to, beside in ((outer, "tcp", RUN), (inner, "tcp", RUN + head), (inner, "tc", b"p" + RUN)):
            if (other, to, beside) != (of, name, owner):
                with pytest.raises(MalformedDescription, match=NOT_SIGNED):
                    claims.read(msgspec.msgpack.encode(claims.SignedDescription(other, signature)), to, beside)


def changed(claim: bytes, **fields: object) -> bytes:
    stated = msgspec.msgpack.decode(claim, type=claims.SignedDescription)
    described = {**msgspec.msgpack.decode(stated.description), **fields}
    return msgspec.msgpack.encode(claims.SignedDescription(msgspec.msgpack.encode(described), stated.signature))


@pytest.mark.parametrize("fields", [{"port": 9}, {"host": "10.0.0.9"}, {"more": 1}, {"endpoint": SigningKey().public}])
def test_a_changed_field_is_refused(fields: dict[str, object]) -> None:
    with Side(TcpTransport(), 1) as side:
        claim = claims.state(side.transport, RUN)
        assert claims.read(changed(claim), "tcp", RUN) == side.transport.describe()
        with pytest.raises(MalformedDescription, match=NOT_SIGNED):
            claims.read(changed(claim, **fields), "tcp", RUN)


def test_swapped_keys_are_refused() -> None:
    """A description with another's key, signed with one's own, or one's own description under another's signature."""
    own, theirs = SigningKey(), SigningKey()
    description = msgspec.msgpack.encode({"endpoint": theirs.public})
    with pytest.raises(MalformedDescription, match=NOT_SIGNED):
        claims.read(claims.signed(description, own, "tcp", RUN), "tcp", RUN)
    signed = msgspec.msgpack.decode(claims.signed(description, theirs, "tcp", RUN), type=claims.SignedDescription)
    mine = msgspec.msgpack.encode({"endpoint": own.public})
    with pytest.raises(MalformedDescription, match=NOT_SIGNED):
        claims.read(msgspec.msgpack.encode(claims.SignedDescription(mine, signed.signature)), "tcp", RUN)


def test_an_endpoint_that_is_said_twice_is_the_one_that_signs() -> None:
    """Transports read the last endpoint, as the check does, so both always see the same key."""
    own, theirs = SigningKey(), SigningKey()
    name, mine, others = (msgspec.msgpack.encode(part) for part in ("endpoint", own.public, theirs.public))
    for first, last in ((mine, others), (others, mine)):
        twice = b"\x82" + name + first + name + last
        claim = claims.signed(twice, own, "fake", RUN)
        if last is mine:
            read = claims.read(claim, "fake", RUN)
            assert msgspec.msgpack.decode(read)["endpoint"] == own.public
            continue
        with pytest.raises(MalformedDescription, match=NOT_SIGNED):
            claims.read(claim, "fake", RUN)


@pytest.mark.parametrize("cut", ["another auto", "no auto", "the run"])
def test_a_part_that_is_cut_out_is_refused(cut: str) -> None:
    with (
        Side(auto(), 1) as victim,
        Side(auto(), 1) as liar,
        Side(auto(), 1) as side,
    ):
        part = msgspec.msgpack.decode(victim.transport.describe())["parts"]["memory"]
        endpoint = {"another auto": liar.transport.endpoint, "no auto": b"", "the run": RUN}[cut]
        described = {"type": "auto", "endpoint": endpoint, "parts": {"memory": part}}
        with pytest.raises(MalformedDescription, match=f"memory: the peer's {NOT_SIGNED}"):
            side.transport.connect(msgspec.msgpack.encode(described))
        assert side.transport.connect(victim.transport.describe())
        assert side.transport.connect(liar.transport.describe())


@pytest.mark.parametrize("make", [InstanceKey, lambda _: SigningKey()])
def test_each_instance_has_a_key_of_its_own(make: Callable[[str], SigningKey]) -> None:
    assert make("tcp").public != make("tcp").public


def test_the_public_key_is_converted_as_the_private_one() -> None:
    """RFC 7748 section 4.1: the base points of both curves, y = 4/5 and u = 9, are each other's image."""
    prime = 2**255 - 19
    base = (4 * pow(5, -1, prime) % prime).to_bytes(32, "little")
    assert to_x25519(base) == (9).to_bytes(32, "little")
    private = X25519PrivateKey.generate()
    for key in (InstanceKey("tcp") for _ in range(20)):
        to_others = key._exchanging.exchange(private.public_key())
        assert private.exchange(X25519PublicKey.from_public_bytes(to_x25519(key.public))) == to_others

"""The handshake: only peers with the secret complete it, and recorded or reflected proofs are refused."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.core.messages import Peer
from kvroom.errors import AuthenticationError, LinkError, RemoteProtocolError
from kvroom.wire import auth
from kvroom.wire.frames import MAX_STRANGER_FRAME_BYTES, FrameReader, encode_frame
from kvroom.wire.handshake import VERSIONS, Handshake, Hello, LinkIdentity, Proof, Refused, Role
from kvroom.wire.keys import RunKey

SECRET = b"sixteen bytes of secret"
_incarnations = itertools.count(1)
encode = msgspec.msgpack.encode


class Side:
    """One handshake on its stream: reads frames under the handshake's limit, and keeps the error."""

    def __init__(
        self,
        role: Role,
        secret: bytes = SECRET,
        incarnation: int | None = None,
        identity: bytes = b"id",
        versions: tuple[int, int] = VERSIONS,
        dialled: str = "",
        key: RunKey | None = None,
    ) -> None:
        me = Peer(f"10.0.0.1:{role.value == 'dialler':d}", next(_incarnations) if incarnation is None else incarnation)
        self.introduced_to: list[Peer] = []
        self.handshake = Handshake(role, secret, me, self._introduce, versions, dialled=dialled, key=key)
        self.reader = FrameReader(self.handshake.frame_limit_bytes)
        self.sent = b""
        self.error: RemoteProtocolError | None = None
        self._identity = identity

    def _introduce(self, peer: Peer) -> LinkIdentity:
        self.introduced_to.append(peer)
        return LinkIdentity(self._identity, 3, (1, 2))

    def take(self) -> bytes:
        data = self.handshake.take()
        self.sent += data
        return data

    def receive(self, data: bytes) -> None:
        try:
            self.reader.feed(data)
            while (body := self.reader.next_frame()) is not None:
                self.handshake.receive(body)
                self.reader.limit_bytes = self.handshake.frame_limit_bytes
        except RemoteProtocolError as error:
            self.error = error


def converse(dialler: Side, acceptor: Side, split: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
    """Carry bytes both ways until neither side sends more, or one has failed and the other has got the reason."""
    while (said := dialler.take()) or (answer := acceptor.take()):
        if said:
            for piece in split(said):
                if acceptor.error is None:
                    acceptor.receive(piece)
        else:
            for piece in split(answer):
                if dialler.error is None:
                    dialler.receive(piece)


def bytewise(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


@pytest.mark.parametrize("split", [lambda data: [data], bytewise])
@pytest.mark.parametrize("secret", [SECRET, b""])
def test_two_holders_of_the_secret_get_to_know_each_other(split: Callable[[bytes], list[bytes]], secret: bytes) -> None:
    dialler = Side(Role.DIALLER, secret, identity=b"from the dialler" * 10_000)
    acceptor = Side(Role.ACCEPTOR, secret, identity=b"from the acceptor")
    converse(dialler, acceptor, split)
    assert dialler.handshake.complete
    assert acceptor.handshake.complete
    assert dialler.handshake.peer_identity == LinkIdentity(b"from the acceptor", 3, (1, 2))
    assert acceptor.handshake.peer_identity == LinkIdentity(b"from the dialler" * 10_000, 3, (1, 2))
    assert dialler.introduced_to == [Peer("10.0.0.1:0", acceptor.introduced_to[0].incarnation + 1)]


def test_nothing_of_the_secret_or_the_identity_is_said_to_one_who_merely_connects() -> None:
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    acceptor.receive(dialler.take())
    reader = FrameReader()
    reader.feed(acceptor.take())
    hello = msgspec.msgpack.decode(reader.next_frame() or b"")
    assert hello[0] == "hello"
    assert reader.next_frame() is None
    assert acceptor.introduced_to == []


def test_a_wrong_secret_is_refused_and_both_sides_give_the_same_cause() -> None:
    dialler, acceptor = Side(Role.DIALLER, b"another secret, long enough"), Side(Role.ACCEPTOR)
    converse(dialler, acceptor)
    assert isinstance(acceptor.error, AuthenticationError)
    assert isinstance(dialler.error, AuthenticationError)
    assert str(dialler.error) == str(acceptor.error)
    assert "the shared secrets of 10.0.0.1:1 and 10.0.0.1:0 differ" in str(dialler.error)
    assert "KVROOM_SECRET" in str(dialler.error)
    assert dialler.introduced_to == acceptor.introduced_to == []
    assert SECRET not in dialler.sent + acceptor.sent


def test_an_acceptor_that_does_not_know_the_secret_gets_no_identity() -> None:
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    acceptor.receive(dialler.take())
    dialler.receive(acceptor.take())
    dialler.receive(encode_frame(encode(Proof(bytes(auth.PROOF_BYTES)))))
    assert isinstance(dialler.error, AuthenticationError)
    assert dialler.introduced_to == []


def test_a_recorded_conversation_opens_no_second_one() -> None:
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    converse(dialler, acceptor)
    assert acceptor.handshake.complete
    victim = Side(Role.ACCEPTOR)
    victim.receive(dialler.sent)
    assert isinstance(victim.error, AuthenticationError)
    assert victim.introduced_to == []
    other_victim = Side(Role.DIALLER)
    other_victim.receive(acceptor.sent)
    assert isinstance(other_victim.error, AuthenticationError)


def test_our_own_hello_sent_back_is_refused() -> None:
    for role in Role:
        side = Side(role)
        side.receive(side.take())
        assert side.error is not None
        assert "this side's own hello" in str(side.error)


def test_our_own_proof_sent_back_is_refused() -> None:
    """The mirror answers with a hello of its own, then with the very proof that the dialler made for it."""
    dialler = Side(Role.DIALLER)
    dialler.take()
    dialler.receive(
        encode_frame(
            encode(
                Hello(
                    magic="kvroom", versions=VERSIONS, nonce=auth.new_nonce(), address="10.0.0.9:1", incarnation=99_999
                )
            )
        )
    )
    proof = dialler.take()
    dialler.receive(proof)
    assert isinstance(dialler.error, AuthenticationError)
    assert dialler.introduced_to == []


def test_two_victims_played_against_each_other_accept_nothing() -> None:
    """A relay without the secret stands between two sides of one role: the role inside the proof prevents this."""
    first, second = Side(Role.DIALLER), Side(Role.DIALLER)
    converse(first, second)
    assert isinstance(first.error or second.error, AuthenticationError)
    assert first.introduced_to == second.introduced_to == []
    waiting = Side(Role.ACCEPTOR), Side(Role.ACCEPTOR)
    converse(*waiting)
    assert all(side.error is None and not side.introduced_to for side in waiting)


@pytest.mark.parametrize(
    ("dialled", "own"),
    [
        ("10.0.0.1:8998", ["10.0.0.1:8998"]),
        ("[::ffff:10.0.0.1]:8998", ["10.0.0.1:8998"]),
        ("[FD00:0:0:0::1]:8998", ["[fd00::1]:8998"]),
        ("Worker-3.:8998", ["worker-3:8998", "10.0.0.1:8998"]),
        ("10.0.0.1:8998", ["worker-3:8998", "10.0.0.1:8998"]),
        ("[fe80::1%eth0]:8998", ["[fe80::1%3]:8998"]),
        ("localhost:8998", ["[::1]:8998"]),
    ],
)
def test_a_dialler_gets_through_that_has_dialled_an_address_of_the_acceptor(dialled: str, own: list[str]) -> None:
    dialler, acceptor = Side(Role.DIALLER, dialled=dialled), Side(Role.ACCEPTOR)
    acceptor.handshake.own_addresses = frozenset(own)
    converse(dialler, acceptor)
    assert dialler.handshake.complete
    assert acceptor.handshake.complete


@pytest.mark.parametrize(
    "dialled", ["10.0.0.2:8998", "10.0.0.1:8999", "worker-3:8998", "localhost:8998", "[fe80::2%eth0]:8998", "x", ""]
)
def test_a_dialler_that_has_dialled_another_address_is_refused_after_its_proof(dialled: str) -> None:
    dialler, acceptor = Side(Role.DIALLER, dialled=dialled), Side(Role.ACCEPTOR)
    acceptor.handshake.own_addresses = frozenset({"10.0.0.1:8998", "[fe80::1%3]:8998"})
    acceptor.receive(dialler.take())
    assert [acceptor.error] == [None]  # one who proves nothing is told nothing
    converse(dialler, acceptor)
    assert isinstance(acceptor.error, AuthenticationError)
    assert isinstance(dialler.error, AuthenticationError)
    assert str(dialler.error) == str(acceptor.error)
    assert f"dialled {dialled or 'an address that it does not state'} and reached 10.0.0.1:8998 or" in str(
        dialler.error
    )
    assert dialler.introduced_to == acceptor.introduced_to == []


def test_a_relay_cannot_state_another_dialled_address() -> None:
    dialler, acceptor = Side(Role.DIALLER, dialled="10.0.0.66:1"), Side(Role.ACCEPTOR)
    acceptor.handshake.own_addresses = frozenset({"10.0.0.1:1"})
    reader = FrameReader()
    reader.feed(dialler.take())
    hello = msgspec.msgpack.decode(reader.next_frame() or b"")
    acceptor.receive(encode_frame(encode([item if item != "10.0.0.66:1" else "10.0.0.1:1" for item in hello])))
    converse(dialler, acceptor)
    assert isinstance(acceptor.error, AuthenticationError)
    assert "secrets" in str(acceptor.error)  # the proof covers the hello as the dialler sent it
    assert dialler.introduced_to == acceptor.introduced_to == []


def keyed(role: Role, key: RunKey | None = None, incarnation: int | None = None) -> Side:
    """Return a side with a key, and with the incarnation derived from it unless another is given."""
    key = RunKey() if key is None else key
    return Side(role, incarnation=key.incarnation if incarnation is None else incarnation, key=key)


def test_two_runs_with_keys_get_to_know_each_other() -> None:
    dialler, acceptor = keyed(Role.DIALLER), keyed(Role.ACCEPTOR)
    converse(dialler, acceptor)
    assert dialler.handshake.complete
    assert acceptor.handshake.complete


class Forger(RunKey):
    """States the public key of another process, and signs with its own, with none, or what it once saw signed."""

    def __init__(self, victim: RunKey, signature: bytes | None) -> None:
        super().__init__()
        self.public, self.incarnation = victim.public, victim.incarnation
        self._signature = signature

    def sign(self, label: bytes, transcript: bytes) -> bytes:
        return super().sign(label, transcript) if self._signature is None else self._signature


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("with_", ["its own signature", "no signature", "a recorded signature", "zeros"])
def test_a_holder_of_the_secret_that_states_the_key_of_another_is_refused(role: Role, with_: str) -> None:
    victim = RunKey()
    recorded = victim.sign(b"kvroom link proof, " + role.value.encode(), bytes(64))
    signature = {"no signature": b"", "a recorded signature": recorded, "zeros": bytes(64)}.get(with_)
    hostile, honest = keyed(role, Forger(victim, signature)), keyed(role.other)
    converse(*(hostile, honest) if role is Role.DIALLER else (honest, hostile))
    assert isinstance(honest.error, AuthenticationError)
    assert "is not signed with its key" in str(honest.error)
    assert str(hostile.error) == str(honest.error)
    assert honest.introduced_to == []


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("stated", [77, 0, 2**64 - 1])
def test_an_incarnation_that_does_not_follow_from_the_key_is_refused(role: Role, stated: int) -> None:
    hostile, honest = keyed(role, incarnation=stated), keyed(role.other)
    converse(*(hostile, honest) if role is Role.DIALLER else (honest, hostile))
    assert isinstance(honest.error, AuthenticationError)
    assert f"incarnation {stated} of" in str(honest.error)
    assert "does not follow from its key" in str(honest.error)
    assert honest.introduced_to == []


@pytest.mark.parametrize("role", list(Role))
def test_a_peer_without_a_key_is_refused(role: Role) -> None:
    hostile, honest = Side(role), keyed(role.other)
    converse(*(hostile, honest) if role is Role.DIALLER else (honest, hostile))
    assert isinstance(honest.error, AuthenticationError)
    assert "has no key of its own" in str(honest.error)
    assert honest.introduced_to == []


@pytest.mark.parametrize("key", [b"", bytes(32), b"short"], ids=["none", "low order", "cut"])
def test_a_key_is_looked_at_only_when_the_dialler_has_proven_the_secret(key: bytes) -> None:
    acceptor = keyed(Role.ACCEPTOR)
    acceptor.take()
    hello = Hello(
        magic="kvroom",
        versions=VERSIONS,
        nonce=auth.new_nonce(),
        address="10.0.0.9:1",
        incarnation=5,
        dialled="10.0.0.1:0",
        key=key,
    )
    acceptor.receive(encode_frame(encode(hello)))
    assert acceptor.error is None
    assert acceptor.take() == b""


def test_a_manager_does_not_link_with_itself() -> None:
    dialler, acceptor = Side(Role.DIALLER, incarnation=77), Side(Role.ACCEPTOR, incarnation=77)
    converse(dialler, acceptor)
    assert str(dialler.error) == "10.0.0.1:0 is this manager itself: dial another address"
    assert dialler.introduced_to == acceptor.introduced_to == []


@pytest.mark.parametrize("versions", [(1, 2), (4, 4), (6, 7)])
def test_versions_that_do_not_meet_are_refused_alike_on_both_sides(versions: tuple[int, int]) -> None:
    dialler, acceptor = Side(Role.DIALLER, versions=versions), Side(Role.ACCEPTOR)
    converse(dialler, acceptor)
    assert str(dialler.error) == str(acceptor.error)
    assert str(acceptor.error) == (
        f"no common protocol version: 10.0.0.1:1 supports {versions[0]} to {versions[1]}, 10.0.0.1:0 5 to 5; "
        f"install the same kvroom on both"
    )


def test_a_later_version_that_still_speaks_ours_may_append_fields_to_its_hello() -> None:
    acceptor = Side(Role.ACCEPTOR)
    acceptor.receive(
        encode_frame(encode(["hello", "kvroom", [1, 9], auth.new_nonce(), "10.0.0.1:9", 5, "", b"", "new", {}]))
    )
    assert acceptor.error is None
    assert acceptor.handshake.peer_hello is not None


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (["hello", "vkroom", [1, 1], bytes(32), "h:1", 5], "not a kvroom handshake frame"),
        (["hello", "kvroom", [1, 1], bytes(31), "h:1", 5], "not a kvroom handshake frame"),
        (["hello", "kvroom", [0, 1], bytes(32), "h:1", 5], "not a kvroom handshake frame"),
        (["hello", "kvroom", [1, 1], bytes(32), "h:1", -5], "not a kvroom handshake frame"),
        (["hello", "kvroom", [1, 1], bytes(32), "no port", 5], "has no port"),
        (["proof", bytes(32)], "expected the frame hello, got Proof"),
        (["identity", b"", 0, []], "expected the frame hello, got LinkIdentity"),
    ],
)
def test_a_bad_first_frame_is_a_protocol_error(hello: list[object], says: str) -> None:
    side = Side(Role.ACCEPTOR)
    side.receive(encode_frame(encode(hello)))
    assert side.error is not None
    assert says in str(side.error)


def test_an_identity_before_the_proof_is_refused() -> None:
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    acceptor.receive(dialler.take())
    acceptor.receive(encode_frame(encode(LinkIdentity(b"let me in"))))
    assert acceptor.error is not None
    assert "expected the frame" in str(acceptor.error)
    assert not acceptor.handshake.complete
    assert acceptor.introduced_to == []


def test_a_stranger_may_only_send_small_frames() -> None:
    acceptor = Side(Role.ACCEPTOR)
    acceptor.receive((MAX_STRANGER_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert acceptor.error is not None
    assert f"expected 1 to {MAX_STRANGER_FRAME_BYTES}" in str(acceptor.error)


def test_a_refusal_is_printed_tame() -> None:
    side = Side(Role.DIALLER)
    side.receive(encode_frame(encode(Refused("authentication", "no\x1b[31m\nfake log line"))))
    assert isinstance(side.error, AuthenticationError)
    assert str(side.error).isprintable()


def test_a_handshake_that_failed_stays_dead() -> None:
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    with pytest.raises(RemoteProtocolError):
        acceptor.handshake.receive(b"\xc1")
    body = dialler.take()[4:]
    with pytest.raises(RemoteProtocolError, match="expected the frame"):
        acceptor.handshake.receive(body)
    assert acceptor.handshake.frame_limit_bytes == 0


@given(st.lists(st.binary(max_size=80), min_size=1, max_size=4), st.integers(0, 3))
def test_garbage_at_any_point_is_a_protocol_error(garbage: list[bytes], after: int) -> None:
    """`after` good frames of a real dialler, then garbage: an error or patience, and never a completed handshake."""
    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    for _ in range(min(after, 2)):
        acceptor.receive(dialler.take())
        dialler.receive(acceptor.take())
    for piece in garbage:
        if acceptor.error is None:
            acceptor.receive(piece)
    assert not acceptor.handshake.complete


@given(st.sampled_from(["hello", "answer", "proof"]), st.integers(0, 10_000))
def test_a_flipped_bit_never_completes_the_handshake(where: str, bit: int) -> None:
    """Every bit of both hellos and of the proof counts: the transcript covers them as they were on the wire."""

    def carried(frame: bytes, turn: str) -> bytes:
        if turn != where or not frame:
            return frame
        changed = bytearray(frame)
        at = 32 + bit % (len(frame) * 8 - 32)  # the length prefix is the stream's, not the conversation's
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed)

    dialler, acceptor = Side(Role.DIALLER), Side(Role.ACCEPTOR)
    acceptor.receive(carried(dialler.take(), "hello"))
    dialler.receive(carried(acceptor.take(), "answer"))
    proof = dialler.take()
    if acceptor.error is None:
        acceptor.receive(carried(proof, "proof"))
    assert acceptor.introduced_to == []


def test_proofs_depend_on_every_part_and_on_its_borders() -> None:
    proof = auth.prove(b"key", b"label", (b"ab", b"c"))
    assert auth.verify(proof, b"key", b"label", (b"ab", b"c"))
    assert not auth.verify(proof, b"yek", b"label", (b"ab", b"c"))
    assert not auth.verify(proof, b"key", b"lebal", (b"ab", b"c"))
    assert not auth.verify(proof, b"key", b"label", (b"a", b"bc"))
    assert not auth.verify(proof, b"key", b"label", (b"abc",))
    assert not auth.verify(proof[:-1], b"key", b"label", (b"ab", b"c"))


def _echoes() -> dict[str, Callable[[bytes, bytes], object]]:
    """Frames of an acceptor that sends back what it was sent: the dialler's nonce and its proof."""
    return {
        "proof": lambda _nonce, proof: Refused("authentication", proof.hex()),
        "proof, parted": lambda _nonce, proof: Refused("protocol", proof.hex(":").upper()),
        "nonce": lambda nonce, _proof: Refused("busy", base64.b64encode(nonce).decode()),
        "no frame": lambda _nonce, proof: (proof.hex(), 1),
    }


@pytest.mark.parametrize("echo", _echoes())
def test_what_a_stranger_sends_back_of_our_proof_is_in_no_error(echo: str) -> None:
    side = Side(Role.DIALLER)
    nonce = msgspec.msgpack.decode(side.take()[4:], type=Hello).nonce
    side.handshake.receive(
        encode(
            Hello(
                magic="kvroom",
                versions=VERSIONS,
                nonce=bytes(32),
                address="10.0.0.2:1",
                incarnation=next(_incarnations),
            )
        )
    )
    proof = msgspec.msgpack.decode(side.take()[4:], type=Proof).mac
    with pytest.raises((RemoteProtocolError, LinkError)) as caught:
        side.handshake.receive(encode(_echoes()[echo](nonce, proof)))
    said = str(caught.value).lower()
    assert "the peer sent this side's nonce or proof back, which is not shown" in said
    for value in (nonce, proof):
        assert value.hex()[:16] not in said.replace(":", "")
        assert base64.b64encode(value).decode().lower()[:12] not in said


@pytest.mark.parametrize(
    "reason",
    [
        "10.0.0.1:8998 accepts no new links now: too many open files: this process may have 1024; raise its limit",
        f"the shared secrets of [fd00::1%eth0]:8998 and {'a' * 200}:1 differ",
        "no common protocol version: 10.0.0.1:1 supports 3 to 3, 10.0.0.2:1 4 to 4",
    ],
)
def test_a_reason_of_its_own_is_shown(reason: str) -> None:
    side = Side(Role.DIALLER)
    with pytest.raises(RemoteProtocolError) as caught:
        side.handshake.receive(encode(Refused("protocol", reason)))
    assert str(caught.value) == reason

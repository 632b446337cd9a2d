"""Two uses of the first frame of a connection: to refuse it for now, and to state the run of a process."""

from __future__ import annotations

import pytest

from kvroom.core.messages import Peer
from kvroom.errors import LinkError, RemoteProtocolError
from kvroom.wire.frames import FrameReader
from kvroom.wire.handshake import MAX_REASON_CHARS, Handshake, LinkIdentity, Role, busy, read_incarnation


def body_of(frame: bytes) -> bytes:
    reader = FrameReader()
    reader.feed(frame)
    body = reader.next_frame()
    assert body is not None
    assert reader.pending_bytes == 0
    return body


def handshake(role: Role, incarnation: int = 5) -> Handshake:
    return Handshake(role, b"", Peer("10.0.0.1:1", incarnation), lambda _: LinkIdentity(b""))


@pytest.mark.parametrize("role", Role)
def test_a_peer_that_is_busy_is_no_protocol_error(role: Role) -> None:
    ours = handshake(role)
    with pytest.raises(LinkError, match=r"10\.0\.0\.2:1 accepts no new links now: too many open files"):
        ours.receive(body_of(busy("10.0.0.2:1 accepts no new links now: too many open files")))
    assert ours.frame_limit_bytes == 0


@pytest.mark.parametrize(
    ("reason", "told"), [("x" * 5000, "x" * MAX_REASON_CHARS), ("a\x1b[2Jb", r"'a\x1b[2Jb'"), ("", "")]
)
def test_what_a_busy_peer_says_is_short_and_printable(reason: str, told: str) -> None:
    with pytest.raises(LinkError) as refused:
        handshake(Role.DIALLER).receive(body_of(busy(reason)))
    assert str(refused.value) == told


@pytest.mark.parametrize("incarnation", [0, 1, 2**64 - 1])
def test_the_first_frame_of_a_manager_says_which_run_it_is(incarnation: int) -> None:
    assert read_incarnation(body_of(handshake(Role.ACCEPTOR, incarnation).take())) == incarnation


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\xa5hello", b"220 mail.example ESMTP", body_of(busy("full"))])
def test_another_first_frame_says_no_run(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_incarnation(body)

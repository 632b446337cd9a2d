"""A sink admits only peers to which it is connected, and only writes under a grant that is bound to them."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kvroom.errors import GrantRevoked, TransportError
from kvroom.plan.blocks import Extents
from kvroom.transports.kit.data_keys import DataKey, InstanceKey
from kvroom.transports.kit.data_socket import WriterAdmission
from kvroom.transports.kit.grants import ForeignGrant, Grants
from kvroom.transports.kit.peers import PeerTable
from kvroom.transports.kit.ranges import u64

WRITER, OTHER = b"writer", b"other"
INSIDE, OUTSIDE = (u64([1000]), u64([10])), (u64([2000]), u64([10]))


class Known(NamedTuple):
    key: DataKey


class Sink:
    """A sink that is connected to `WRITER` and has granted it 100 bytes at 1000."""

    def __init__(self) -> None:
        own, theirs = InstanceKey("some"), InstanceKey("some")
        self.known = Known(own.shared_with(theirs.public))
        self.peers: PeerTable[Known] = PeerTable("some")
        self.grants = Grants("some")
        self.admission = WriterAdmission(own.public, self.peers, self.grants, introduction_s=0)
        self.handle = self.peers.add(WRITER, self.known)
        self.grant = self.grants.issue(Extents(u64([1000]), u64([100])))
        self.grants.bind(self.grant, WRITER)


def test_a_peer_that_this_side_is_connected_to_has_a_key_and_may_write_what_it_was_granted() -> None:
    sink = Sink()
    assert sink.admission.key_with(WRITER) is sink.known.key
    sink.admission.check(WRITER, sink.grant, *INSIDE)
    assert sink.admission.is_open(sink.grant)


@pytest.mark.parametrize("forget", [False, True], ids=["detached", "forgotten"])
def test_a_peer_that_was_fenced_has_no_key_and_may_write_nothing(forget: bool) -> None:
    sink = Sink()
    sink.peers.detach(sink.handle)
    if forget:
        sink.peers.forget(sink.handle)
    assert sink.admission.key_with(WRITER) is None
    with pytest.raises(TransportError, match="has fenced it"):
        sink.admission.check(WRITER, sink.grant, *INSIDE)


def test_a_stranger_has_no_key_and_may_write_nothing() -> None:
    sink = Sink()
    assert sink.admission.key_with(OTHER) is None
    with pytest.raises(TransportError, match="has not connected to the writer"):
        sink.admission.check(OTHER, sink.grant, *INSIDE)


def test_another_peer_may_not_write_under_the_grant() -> None:
    sink = Sink()
    sink.peers.add(OTHER, sink.known)
    with pytest.raises(ForeignGrant):
        sink.admission.check(OTHER, sink.grant, *INSIDE)


def test_nothing_is_written_outside_of_the_grant_or_after_it() -> None:
    sink = Sink()
    with pytest.raises(TransportError, match="destination block 0"):
        sink.admission.check(WRITER, sink.grant, *OUTSIDE)
    sink.grants.revoke(sink.grant)
    assert not sink.admission.is_open(sink.grant)
    with pytest.raises(GrantRevoked):
        sink.admission.check(WRITER, sink.grant, *INSIDE)

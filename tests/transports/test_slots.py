"""The table of leases: free, leased and quarantined slots, and the events that free them."""

from __future__ import annotations

from kvroom.transports.onesided.packing.slots import Slots

ONE, TWO = object(), object()
GRANT, OTHER = b"g" * 16, b"o" * 16


def counts(slots: Slots) -> tuple[int, int, int]:
    return slots.free, slots.leased, slots.quarantined


def test_a_lease_ends_when_its_writer_says_so_on_its_own_connection() -> None:
    slots = Slots(2)
    slot = slots.lease(b"a", ONE, GRANT)
    assert slot is not None
    assert counts(slots) == (1, 1, 0)
    assert not slots.end(slot, TWO)
    assert slots.find(slot, TWO) is None
    assert slots.held(ONE) == 1
    assert slots.end(slot, ONE)
    assert not slots.end(slot, ONE)
    assert counts(slots) == (2, 0, 0)


def test_no_slot_is_leased_twice() -> None:
    slots = Slots(3)
    assert {slots.lease(b"a", ONE, GRANT) for _ in range(3)} == {0, 1, 2}
    assert slots.lease(b"b", TWO, GRANT) is None


def test_a_lost_connection_quarantines_until_the_writer_is_quiet() -> None:
    slots = Slots(2)
    slots.lease(b"a", ONE, GRANT)
    kept = slots.lease(b"b", TWO, GRANT)
    slots.lost(ONE)
    assert counts(slots) == (0, 1, 1)
    assert slots.owners == {b"a"}
    assert slots.lease(b"c", TWO, GRANT) is None
    slots.quiet(b"b")
    assert counts(slots) == (1, 0, 1)
    slots.quiet(b"a")
    assert counts(slots) == (2, 0, 0)
    assert kept is not None
    assert not slots.end(kept, TWO)


def test_a_revoked_lease_is_quarantined_until_its_write_is_over() -> None:
    slots = Slots(2)
    mine, other = slots.lease(b"a", ONE, GRANT), slots.lease(b"a", ONE, OTHER)
    slots.revoke(GRANT)
    assert counts(slots) == (0, 1, 1)
    assert slots.held(ONE) == 2
    assert mine is not None
    assert slots.end(mine, ONE)
    assert counts(slots) == (1, 1, 0)
    assert other is not None

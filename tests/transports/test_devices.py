"""The device of an address, and blocks by pairs of devices, compared with slow, obvious code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.errors import ConfigurationError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports.kit.devices import Devices, by_device, cpu_memory, device_memory
from kvroom.transports.kit.ranges import u64

HERE = [
    MemoryRange(5000, 100, "cuda:1"),
    MemoryRange(1000, 100, "cpu"),
    MemoryRange(2000, 100, "cuda:0"),
    MemoryRange(3000, 100, "cuda:0"),
    MemoryRange(4000, 100, "cpu"),
]
THERE = [MemoryRange(2**64 - 200, 100, "cuda:0"), MemoryRange(64, 100, "cpu"), MemoryRange(164, 100, "npu:3")]
spots = st.tuples(st.integers(0, len(HERE) - 1), st.integers(0, len(THERE) - 1), st.integers(0, 99))


def test_devices_are_named_once_by_address() -> None:
    assert Devices(HERE).names == ("cpu", "cuda:0", "cuda:1")
    assert Devices(THERE).names == ("cpu", "npu:3", "cuda:0")
    assert Devices([]).names == ("cpu",)


@given(st.lists(spots, max_size=50))
def test_every_address_is_on_the_device_of_its_range(spots: list[tuple[int, int, int]]) -> None:
    for memory, which in ((HERE, 0), (THERE, 1)):
        devices = Devices(memory)
        index = devices.of(u64(memory[spot[which]].address + spot[2] for spot in spots))
        assert [devices.names[i] for i in index.tolist()] == [memory[spot[which]].device for spot in spots]


@given(st.lists(spots, max_size=50))
def test_groups_are_the_same_copies_in_order(spots: list[tuple[int, int, int]]) -> None:
    src, dst = u64(HERE[i].address + at for i, _, at in spots), u64(THERE[j].address + at for _, j, at in spots)
    blocks = Blocks(src, dst, u64(range(1, len(spots) + 1)))
    wanted: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for (i, j, _), copy in zip(spots, zip(*(part.tolist() for part in blocks), strict=True), strict=True):
        wanted.setdefault((HERE[i].device, THERE[j].device), []).append(copy)
    groups = by_device(blocks, Devices(HERE), Devices(THERE))
    got = {(g.source, g.sink): list(zip(*(part.tolist() for part in g.blocks), strict=True)) for g in groups}
    assert got == wanted
    assert len(groups) == len(wanted)
    ordered = [(Devices(HERE).names.index(g.source), Devices(THERE).names.index(g.sink)) for g in groups]
    assert ordered == sorted(ordered)


def test_one_device_on_both_sides_is_not_looked_at() -> None:
    blocks = Blocks(u64([1]), u64([2]), u64([3]))
    (group,) = by_device(blocks, Devices([MemoryRange(1, 9, "cuda:0")]), Devices([MemoryRange(1, 9)]))
    assert (group.source, group.sink) == ("cuda:0", "cpu")
    assert group.blocks is blocks


def test_one_group_is_not_copied() -> None:
    blocks = Blocks(u64([1001, 4001]), u64([64, 65]), u64([3, 3]))
    (group,) = by_device(blocks, Devices(HERE), Devices(THERE))
    assert (group.source, group.sink) == ("cpu", "cpu")
    assert group.blocks is blocks


def test_no_blocks_are_no_groups_of_several_devices() -> None:
    none = np.empty(0, np.uint64)
    assert by_device(Blocks(none, none, none), Devices(HERE), Devices(THERE)) == []


def test_memory_of_the_kinds_that_a_transport_moves() -> None:
    assert device_memory("local", iter(HERE), ("cpu", "cuda")) == HERE
    assert cpu_memory("tcp", HERE[1:2]) == HERE[1:2]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (HERE, "transport tcp moves cpu memory only, but a region lies on 'cuda:1': keep the KV pool in cpu memory or"),
        ([MemoryRange(0, 5)], "address and nbytes must be positive"),
        ([MemoryRange(5, 0)], "address and nbytes must be positive"),
    ],
)
def test_memory_of_another_kind_is_refused(memory: list[MemoryRange], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cpu_memory("tcp", memory)


def test_an_address_on_two_devices_is_refused() -> None:
    memory = [MemoryRange(1000, 100, "cpu"), MemoryRange(1099, 10, "cuda:0")]
    with pytest.raises(ConfigurationError, match="overlap, but are on different devices: correct"):
        device_memory("local", memory, ("cpu", "cuda"))
    memory = [MemoryRange(1000, 100, "cpu"), MemoryRange(1010, 10), MemoryRange(1050, 10, "cuda:0")]
    with pytest.raises(ConfigurationError, match="overlap, but are on different devices"):
        device_memory("local", memory, ("cpu", "cuda"))
    assert device_memory("local", [MemoryRange(1000, 100), MemoryRange(1100, 1, "cuda:0")], ("cpu", "cuda"))

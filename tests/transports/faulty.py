"""Transports with one bug each, and the checks that must find it. `PLANTED` has every check of the suite.

Most of them are `memory` with one change, so that a check takes milliseconds. A transport is named "faulty:Class".
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvroom.conformance import suite as conformance
from kvroom.conformance.suite import Case
from kvroom.errors import TransportError
from kvroom.plan.blocks import Blocks, MemoryRange
from kvroom.transports import Transfer
from kvroom.transports.kit.transfers import failed, finished
from kvroom.transports.local import LocalTransport
from kvroom.transports.memory import MemoryTransport, _world
from kvroom.transports.tcp import TcpTransport
from kvroom.wire.keys import SigningKey

_kept: list[object] = []


class Rounds(MemoryTransport):
    """Writes only to addresses that are multiples of 16."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        return super().submit(peer, blocks._replace(dst=blocks.dst & ~np.uint64(15)), grant)


class Overshoots(MemoryTransport):
    """Every block is one byte longer than it should be."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        super().submit(peer, blocks._replace(length=blocks.length + np.uint64(1)), grant).result()
        return finished(blocks.nbytes)


class Forgets(MemoryTransport):
    """Loses the last block of a batch of more than 2^16."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if blocks.length.size > 1 << 16:
            super().submit(peer, Blocks(*(part[:-1] for part in blocks)), grant).result()
            return finished(blocks.nbytes)
        return super().submit(peer, blocks, grant)


class Truncates(MemoryTransport):
    """Moves only 8 MiB of a block that is longer."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        super().submit(peer, blocks._replace(length=np.minimum(blocks.length, 8 << 20)), grant).result()
        return finished(blocks.nbytes)


class Limited(MemoryTransport):
    """Passes a limit of its queue on to the caller: 65,535 blocks, 1,024 transfers, 4 peers, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0

    def connect(self, description: bytes) -> int:
        handle = super().connect(description)
        if handle > 4:
            raise TransportError("no room for another peer")
        return handle

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        self._taken += 1
        if not 0 < blocks.length.size < 1 << 16 or self._taken > 1024:
            return failed(TransportError("the queue is full"))
        return super().submit(peer, blocks, grant)


class Pads(MemoryTransport):
    """Treats a block of no bytes as one of one byte."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        super().submit(peer, blocks._replace(length=np.maximum(blocks.length, 1)), grant).result()
        return finished(blocks.nbytes)


class Splits(MemoryTransport):
    """Treats each registered piece separately, and refuses a block across the border between two of them."""

    def register(self, memory: Sequence[MemoryRange]) -> None:
        super().register(memory)
        self._borders = np.array(sorted(piece.address for piece in memory), np.uint64)

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        first, last = blocks.src, blocks.src + blocks.length - np.uint64(1)
        if (np.searchsorted(self._borders, first, "right") != np.searchsorted(self._borders, last, "right")).any():
            return failed(TransportError("a block lies in two regions"))
        return super().submit(peer, blocks, grant)


class Babbles(MemoryTransport):
    """Has a description of more than 64 KiB."""

    def describe(self) -> bytes:
        return super().describe() + bytes(1 << 16)

    def connect(self, description: bytes) -> int:
        return super().connect(description[: -(1 << 16)])


class Miscounts(MemoryTransport):
    """Returns the number of blocks instead of bytes."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        super().submit(peer, blocks, grant).result()
        return finished(int(blocks.length.size))


class HalfDuplex(MemoryTransport):
    """Does not send while it may receive."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if self._grants._open:
            return failed(TransportError("this side receives"))
        return super().submit(peer, blocks, grant)


class Waits(TcpTransport):
    """Waits in `submit` for an action of the peer."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        transfer = super().submit(peer, blocks, grant)
        concurrent.futures.wait([transfer], 0.05)
        return transfer


class Ignores(MemoryTransport):
    """Skips blocks that it may not move, and reports success, even where the peer is gone."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        transfer = super().submit(peer, blocks, grant)
        return finished(blocks.nbytes) if transfer.exception() else transfer


class WritesSome(MemoryTransport):
    """Writes the blocks before the invalid one."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        transfer = super().submit(peer, blocks, grant)
        if transfer.exception():
            super().submit(peer, Blocks(*(part[:10] for part in blocks)), grant).result()
        return transfer


class Believes(MemoryTransport):
    """Accepts any bytes as a description."""

    def connect(self, description: bytes) -> int:
        try:
            return super().connect(description)
        except TransportError:
            return 1


class SignsOtherwise(MemoryTransport):
    """Has another key than the one in its description."""

    def __init__(self) -> None:
        super().__init__()
        self.key = SigningKey()


class NewHandles(MemoryTransport):
    """Returns a new handle for the same endpoint each time."""

    def connect(self, description: bytes) -> int:
        endpoint = self._peers.find(handle := super().connect(description))
        self._peers.forget(handle)
        assert endpoint is not None
        return self._peers.add(endpoint, endpoint)


class LaxGrants(MemoryTransport):
    """Reports a revoke as proof, and checks no grant."""

    def __init__(self) -> None:
        super().__init__()
        self.faults.proof = False

    def revoke(self, grant: bytes) -> bool:
        return True


class Shares(MemoryTransport):
    """Lets every peer write under a grant that was offered to one."""

    def admit(self, source: bytes, blocks: Blocks, grant: bytes) -> None:
        self._grants.bind(grant, source)
        super().admit(source, blocks, grant)


class Echoes(MemoryTransport):
    """Lands every transfer immediately, and again a moment later, like an engine that retransmits."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        transfer, endpoint = super().submit(peer, blocks, grant), self._peers.find(peer)
        if not transfer.exception():
            again = threading.Timer(0.1, self._again, [endpoint, blocks])
            again.daemon = True
            again.start()
        return transfer

    @staticmethod
    def _again(endpoint: bytes, blocks: Blocks) -> None:
        with _world.changed:
            if endpoint in _world.endpoints:
                for src, dst, length in zip(*(part.tolist() for part in blocks), strict=True):
                    ctypes.memmove(dst, src, length)


class NeverFences(MemoryTransport):
    """Reports a fence as proof, and goes on writing."""

    def fence(self, peer: int) -> bool:
        return True


class KnowsOnePeer(MemoryTransport):
    """Treats every new description as that of its first peer."""

    def connect(self, description: bytes) -> int:
        return 1 if self._peers.all() else super().connect(description)


class Compacts(MemoryTransport):
    """Treats blocks of one size as contiguous in the source."""

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if blocks.length.size > 1 and (blocks.length == blocks.length[0]).all():
            step = np.arange(blocks.length.size, dtype=np.uint64) * blocks.length[0]
            blocks = blocks._replace(src=blocks.src.min() + step)
        return super().submit(peer, blocks, grant)


class Hoards(MemoryTransport):
    """Never frees a staging slot."""

    def staging_slots(self) -> dict[str, int]:
        return {"leased": 1}


class Poisoned(MemoryTransport):
    """After one failure, every transfer fails."""

    def __init__(self) -> None:
        super().__init__()
        self._broken = False

    def submit(self, peer: int, blocks: Blocks, grant: bytes) -> Transfer:
        if self._broken:
            return failed(TransportError("the session is broken"))
        transfer = super().submit(peer, blocks, grant)
        self._broken = transfer.exception() is not None
        return transfer


class LeaksMemory(LocalTransport):
    """Keeps 16 KiB for every `connect`."""

    def connect(self, description: bytes) -> int:
        _kept.append(bytearray(os.urandom(1 << 14)))
        return super().connect(description)


class LeaksThreads(LocalTransport):
    """Keeps a thread and a descriptor for every transport."""

    def register(self, memory: Sequence[MemoryRange]) -> None:
        super().register(memory)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        _kept.append(os.open(os.devnull, os.O_RDONLY))


class Bug(NamedTuple):
    """A planted transport, the checks that must fail with it, and a word that each failure must contain."""

    transport: type
    word: str
    checks: tuple[str, ...]

    @property
    def case(self) -> Case:
        """The case with which the suite runs it."""
        one_process = issubclass(self.transport, MemoryTransport)
        return Case(f"faulty:{self.transport.__name__}", one_process=one_process)


PLANTED = (
    Bug(Rounds, "bytes are wrong", ("moves_scattered_unaligned_blocks",)),
    Bug(Overshoots, "bytes are wrong", ("moves_one_byte",)),
    Bug(Forgets, "bytes are wrong", ("moves_200_000_single_bytes", "moves_200_000_blocks")),
    Bug(Truncates, "bytes are wrong", ("moves_blocks_of_16_mib", "moves_mixed_sizes")),
    Bug(Limited, "queue is full", ("moves_no_blocks", "takes_many_small_transfers", "takes_batches_over_any_limit")),
    Bug(Limited, "no room for another peer", ("serves_many_sinks", "serves_many_sources")),
    Bug(Pads, "bytes are wrong", ("skips_empty_blocks",)),
    Bug(Splits, "in two regions", ("moves_across_regions_that_touch",)),
    Bug(Babbles, "a description has", ("serves_many_regions",)),
    Bug(Miscounts, "a transfer reported", ("keeps_transfers_apart",)),
    Bug(HalfDuplex, "this side receives", ("moves_both_ways_at_once",)),
    Bug(Waits, "20 submits took", ("submit_does_not_wait_for_the_peer",)),
    Bug(
        Ignores,
        "succeeded",
        (
            "refuses_unregistered_destination",
            "refuses_destination_across_a_border",
            "refuses_wrapping_destination",
            "refuses_unregistered_source",
            "refuses_a_bad_block_in_a_great_batch",
            "a_killed_peer_fails_transfers_and_is_fenced",
        ),
    ),
    Bug(WritesSome, "bytes are wrong", ("refuses_unregistered_destination",)),
    Bug(Believes, "for a description", ("refuses_what_is_no_description_and_no_handle",)),
    Bug(SignsOtherwise, "does not name its `key`", ("names_the_key_that_signs",)),
    Bug(NewHandles, "another handle", ("gives_an_endpoint_one_handle",)),
    Bug(LaxGrants, "succeeded", ("enforces_grants_if_it_proves_them",)),
    Bug(LaxGrants, "were written after", ("nothing_lands_after_a_proven_revoke",)),
    Bug(
        Shares,
        "succeeded",
        ("a_grant_is_of_use_to_its_peers_only", "refuses_small_blocks_under_a_grant_of_another"),
    ),
    Bug(
        Echoes,
        "were written after",
        (
            "nothing_lands_after_a_proven_revoke",
            "nothing_lands_after_the_source_fenced",
            "nothing_lands_after_a_proven_fence",
            "a_killed_writer_is_fenced_and_writes_no_more",
            "close_ends_what_is_under_way",
        ),
    ),
    Bug(Compacts, "bytes are wrong", ("moves_small_strided_blocks",)),
    Bug(Hoards, "after all has landed", ("moves_small_strided_blocks",)),
    Bug(
        Hoards,
        "is given back",
        ("a_killed_writer_of_small_blocks_leaves_nothing", "a_killed_sink_of_small_blocks_leaves_nothing"),
    ),
    Bug(LaxGrants, "succeeded", ("refuses_small_blocks_outside_the_grant",)),
    Bug(LaxGrants, "were written after", ("no_small_block_lands_after_a_revoke",)),
    Bug(NeverFences, "succeeded", ("fences_and_connects_again",)),
    Bug(KnowsOnePeer, "another peer", ("meets_a_restarted_peer",)),
    Bug(KnowsOnePeer, "the peer is gone", ("a_closed_peer_is_met_again",)),
    Bug(
        Poisoned,
        "session is broken",
        ("serves_the_living_while_a_peer_is_dead", "refuses_unregistered_destination"),
    ),
    Bug(Poisoned, "these succeeded", ("a_failed_batch_is_followed_by_good_ones",)),
    Bug(LeaksMemory, "grew from", ("connects_and_fences_without_growth",)),
    Bug(LeaksThreads, "grew from", ("opens_and_closes_without_growth",)),
)
FOUND = [(bug, check) for bug in PLANTED for check in conformance.CHECKS if check.__name__ in bug.checks]

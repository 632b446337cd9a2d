"""Checks of transfers that must fail: memory that is not registered, revoked grants, fenced peers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvroom.errors import TransportError

from .stage import (
    SMALL,
    CheckStage,
    Skipped,
    among,
    apply,
    connect,
    expect,
    fails,
    flood,
    lands,
    one_block,
    refused,
    scattered,
    settle,
    undisturbed,
    until,
    usable,
)


def refuses_unregistered_destination(stage: CheckStage) -> None:
    """One block outside of registered memory fails the whole transfer: no byte is written, and the next one lands."""
    pair = stage.pair(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 100, 1_000), pair.grant()
    good = blocks._replace(dst=blocks.dst.copy())
    blocks.dst[57] = pair.sink.addresses[1] + SMALL[1]
    text = refused(pair, blocks, grant)
    expect("outside" in text, f"the error does not say that a block lies outside of registered memory: {text}")
    lands(pair, good, grant)


def refuses_destination_across_a_border(stage: CheckStage) -> None:
    """A block that ends one byte behind registered memory, or begins one byte before it, is refused."""
    pair = stage.pair(SMALL)
    refused(pair, one_block(pair.source, pair.sink, 100, at=SMALL[-1] - 99), pair.grant())
    refused(pair, one_block(pair.source, pair.sink, 100, at=-1), pair.grant())


def refuses_wrapping_destination(stage: CheckStage) -> None:
    """A block whose address plus length overflows 64 bits is refused."""
    pair = stage.pair(SMALL)
    blocks = one_block(pair.source, pair.sink, 100)
    blocks.dst[0] = 2**64 - 50
    refused(pair, blocks, pair.grant())


def refuses_unregistered_source(stage: CheckStage) -> None:
    """A block from memory that this side has not registered is not sent, and the next transfer succeeds."""
    pair = stage.pair(SMALL)
    for start in (-1, SMALL[-1] - 99, SMALL[-1]):
        refused(pair, one_block(pair.source, pair.sink, 100, start=start), pair.grant())
    lands(pair, one_block(pair.source, pair.sink, 100))


def refuses_a_bad_block_in_a_great_batch(stage: CheckStage) -> None:
    """If the last of 60,000 blocks is bad, the transfer fails, and bytes changed only where its good blocks belong."""
    pair = stage.pair()
    blocks = scattered(pair.source, pair.sink, 60_000, 100)
    before, after = pair.sink.contents(), pair.sink.contents()
    apply(blocks, pair.source, pair.sink, pair.source.contents(), after)
    blocks.dst[-1] = pair.sink.addresses[0] + pair.sink.sizes[0]
    fails(pair, blocks, pair.grant())
    among(pair.sink.contents(), before, after)
    usable(pair, scattered(pair.source, pair.sink, 100, 1_000))


def refuses_what_is_no_description_and_no_handle(stage: CheckStage) -> None:
    """A malformed description, and a handle that `connect` never returned, each raise a `TransportError`."""
    pair = stage.pair(SMALL)
    for garbage in (b"", b"no description", pair.sink.describe()[:-1]):
        try:
            pair.source.connect(garbage)
        except TransportError:
            continue
        raise AssertionError(f"connect accepted {garbage[:20]!r} for a description")
    fails(pair._replace(to_sink=pair.to_sink + 1_000), one_block(pair.source, pair.sink, 100), pair.grant())
    lands(pair, one_block(pair.source, pair.sink, 100))


def names_the_key_that_signs(stage: CheckStage) -> None:
    """Each end's description names its own `key` as the endpoint, so that peers refuse it from any other peer."""
    pair = stage.pair(SMALL)
    expect(pair.source.signs(), "the source's `describe` does not name its `key` as the endpoint")
    expect(pair.sink.signs(), "the sink's `describe` does not name its `key` as the endpoint")


def gives_an_endpoint_one_handle(stage: CheckStage) -> None:
    """A second `connect` to the same endpoint returns the same handle."""
    pair = stage.pair(SMALL)
    expect(pair.source.connect(pair.sink.describe()) == pair.to_sink, "the source got another handle")
    expect(pair.sink.connect(pair.source.describe()) == pair.to_source, "the sink got another handle")
    lands(pair, one_block(pair.source, pair.sink, 4_096))


def enforces_grants_if_it_proves_them(stage: CheckStage) -> None:
    """If `revoke` is proof, nothing lands outside a grant, or under a grant that was revoked or never issued."""
    pair = stage.pair(SMALL)
    blocks = one_block(pair.source, pair.sink, 4_096, at=8_192)
    granted = pair.grant_of(blocks.dst, blocks.length)
    lands(pair, blocks, granted)
    if pair.sink.revoke(granted):
        refused(pair, blocks, granted)
        beside = pair.grant_of(blocks.dst + np.uint64(1), blocks.length)
        refused(pair, blocks, beside)
        refused(pair, blocks, bytes(len(granted)))
    lands(pair, blocks)


def a_grant_is_of_use_to_its_peers_only(stage: CheckStage) -> None:
    """If `revoke` is proof, only peers that a grant is bound to can write under it; it may be bound to several."""
    pair = stage.pair(SMALL)
    other = connect(stage.open(SMALL), pair.sink)
    if not pair.sink.revoke(pair.grant()):
        raise Skipped("`revoke` is no proof over this transport")
    grant = pair.sink.grant(np.array(pair.sink.addresses, np.uint64), np.array(SMALL, np.uint64))
    for each in (pair, other):
        refused(each, one_block(each.source, pair.sink, 4_096), grant)  # it is bound to no peer yet
    pair.sink.bind(grant, pair.to_source)
    text = refused(other, one_block(other.source, pair.sink, 4_096), grant)
    expect("not offered" in text, f"the error does not say that the grant was not offered to this peer: {text}")
    lands(pair, one_block(pair.source, pair.sink, 4_096), grant)
    lands(other, one_block(other.source, pair.sink, 4_096))
    pair.sink.bind(grant, other.to_source)
    for each in (other, pair):
        lands(each, one_block(each.source, pair.sink, 4_096, at=8_192), grant)


def nothing_lands_after_a_proven_revoke(stage: CheckStage) -> None:
    """If `revoke` is proof, no byte of a transfer in flight lands after it, so the memory can be used again."""
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    if not pair.sink.revoke(pair.grant()):
        raise Skipped("`revoke` is no proof over this transport")
    tickets = flood(pair, blocks, grant)
    expect(pair.sink.revoke(grant), "`revoke` is proof for an unused grant, but not while transfers use one")
    undisturbed(pair.sink, lambda: tickets.extend(flood(pair, blocks, grant, 5)))
    expect(not any(settle(pair.source, tickets)[-5:]), "a transfer under a revoked grant succeeded")
    usable(pair, blocks)


def nothing_lands_after_the_source_fenced(stage: CheckStage) -> None:
    """The source's `fence` returns after every transfer to that peer is done, and no byte of them lands later."""
    pair, other = stage.pair(), stage.open(SMALL)
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    flood(pair, blocks, grant)
    pair.source.fence(pair.to_sink)
    expect(pair.source.unfinished() == 0, "`fence` returned, but transfers to that peer are not done")
    elsewhere = connect(pair.source, other)

    def go_on() -> None:
        fails(pair, blocks, grant)
        lands(elsewhere, scattered(pair.source, other, 100, 500))

    undisturbed(pair.sink, go_on)
    lands(connect(pair.source, pair.sink), blocks)


def nothing_lands_after_a_proven_fence(stage: CheckStage) -> None:
    """Once the sink's `fence` has returned True, no byte of that writer lands, whatever the writer does.

    A `fence` that returns False must return True soon after the writer's process was killed.
    """
    pair = stage.pair()
    blocks, grant = scattered(pair.source, pair.sink, 5_000, 600), pair.grant()
    tickets = flood(pair, blocks, grant)
    if pair.sink.fence(pair.to_source):
        undisturbed(pair.sink, lambda: tickets.extend(flood(pair, blocks, grant, 5)))
        expect(not any(settle(pair.source, tickets)[-5:]), "a transfer of a fenced writer succeeded")
        lands(connect(pair.source, pair.sink), blocks)
    else:
        stage.kill(pair.source)
        until(lambda: pair.sink.fence(pair.to_source), "`fence` of a dead writer returns True")
        undisturbed(pair.sink)
        again = connect(stage.open(), pair.sink)
        lands(again, scattered(again.source, again.sink, 500, 600))


def fences_and_connects_again(stage: CheckStage) -> None:
    """A transfer to a fenced handle fails; after another `connect`, blocks land. A second `fence` does no harm."""
    pair = stage.pair(SMALL)
    blocks = one_block(pair.source, pair.sink, 4_096)
    proven = pair.sink.fence(pair.to_source)
    pair.source.fence(pair.to_sink)
    pair.source.fence(pair.to_sink)
    refused(pair, blocks, pair.grant())
    again = connect(pair.source, pair.sink)
    expect(not proven or again.to_source != pair.to_source, "`connect` reused a handle that a proven fence had ended")
    lands(again, blocks)


CHECKS: tuple[Callable[[CheckStage], None], ...] = (
    refuses_unregistered_destination,
    refuses_destination_across_a_border,
    refuses_wrapping_destination,
    refuses_unregistered_source,
    refuses_a_bad_block_in_a_great_batch,
    refuses_what_is_no_description_and_no_handle,
    names_the_key_that_signs,
    gives_an_endpoint_one_handle,
    enforces_grants_if_it_proves_them,
    a_grant_is_of_use_to_its_peers_only,
    nothing_lands_after_a_proven_revoke,
    nothing_lands_after_the_source_fenced,
    nothing_lands_after_a_proven_fence,
    fences_and_connects_again,
)

"""Ownership of pages: every page has one holder, a shared page is never written, and a held page is never evicted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvroom.engine.lease import Lease
from kvroom.engine.pages import PageBook, PoolCounts
from kvroom.engine.pool import PagedPool
from kvroom.engine.prefix import PageKeys
from kvroom.engine.shape import CacheShape, KVShape
from kvroom.errors import KVRoomError

KEYS = PageKeys.agreeing("model", page_tokens=4)
TINY = CacheShape(KVShape(layers=(0,), kv_heads=1, head_dim=1))


def make_pool(pages: int = 8) -> PagedPool:
    return PagedPool(TINY, pages=pages, page_tokens=4, dtype=torch.float32)


def counts(*, free: int, cached: int = 0, owned: int = 0, quarantined: int = 0, pages: int = 8) -> PoolCounts:
    return PoolCounts(pages, free, cached, owned, quarantined)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_names_every_token_up_to_its_end() -> None:
    tokens = list(range(12))
    keys = KEYS.of(tokens)
    assert len(set(keys)) == 3
    for changed in range(12):
        other = KEYS.of([*tokens[:changed], 99, *tokens[changed + 1 :]])
        assert [a == b for a, b in zip(keys, other, strict=True)] == [page < changed // 4 for page in range(3)]
    assert KEYS.of([1, 2, 3, 4] * 2)[0] != KEYS.of([1, 2, 3, 4] * 2)[1]  # equal tokens after a different prefix


def test_only_full_pages_have_keys_and_known_ones_are_continued() -> None:
    tokens = [5] * 11
    assert [len(KEYS.of(tokens[:count])) for count in range(12)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert KEYS.of(tokens, KEYS.of(tokens[:7])) == KEYS.of(tokens)
    assert KEYS.of([]) == ()


def test_what_must_agree_is_in_every_key() -> None:
    others = [PageKeys.agreeing("other", page_tokens=4), PageKeys.agreeing("model", page_tokens=2)]
    assert all(keys.of([1, 2, 3, 4])[0] != KEYS.of([1, 2, 3, 4])[0] for keys in others)
    assert PageKeys.agreeing("model", page_tokens=4) == KEYS


# -- the book ----------------------------------------------------------------------------------------------------------


def test_allocation_is_all_or_nothing() -> None:
    book = PageBook(8)
    first = book.allocate(5)
    assert first == (0, 1, 2, 3, 4)
    assert book.allocate(4) is None
    assert book.counts() == counts(free=3, owned=5)
    book.release(first)
    book.check_idle()


def test_quarantined_pages_are_nobodys_until_they_are_restored() -> None:
    book = PageBook(8)
    pages = book.allocate(6) or ()
    book.quarantine(pages)
    assert book.counts() == counts(free=2, quarantined=6)
    assert book.allocate(3) is None
    with pytest.raises(KVRoomError, match="not idle"):
        book.check_idle()
    book.restore(pages)
    book.check_idle()


def test_what_nobody_holds_cannot_be_let_go_and_nothing_changes() -> None:
    book = PageBook(8)
    pages = book.allocate(3) or ()
    book.release(pages[:1])
    before = book.counts()
    with pytest.raises(KVRoomError, match=r"pages \[0\] are not owned"):
        book.release(pages)
    with pytest.raises(KVRoomError, match=r"pages \[0\] are not owned"):
        book.quarantine(pages)
    with pytest.raises(KVRoomError, match=r"pages \[0\] are not owned"):
        book.commit(pages, KEYS.of([0] * 12))
    with pytest.raises(KVRoomError, match=r"pages \[0, 1, 2\] are not quarantined"):
        book.restore(pages)
    assert book.counts() == before
    book.check()


@pytest.mark.parametrize("holder", ["_free", "_owned", "_quarantined"])
def test_a_lost_page_and_one_with_two_holders_are_found(holder: str) -> None:
    def mixed() -> PageBook:
        book = PageBook(8)
        pages = book.allocate(5) or ()
        book.quarantine(pages[:2])
        book.check()
        return book

    lost, twice = mixed(), mixed()
    getattr(lost, holder).remove(next(iter(getattr(lost, holder))))
    other = "_owned" if holder != "_owned" else "_quarantined"
    getattr(twice, other).add(next(iter(getattr(twice, holder))))
    for book in (lost, twice):
        with pytest.raises(KVRoomError, match="lost or counted twice"):
            book.check()


def test_the_page_that_was_not_used_for_longest_is_evicted_first_and_of_a_prefix_its_end() -> None:
    book = PageBook(4)
    old, new = KEYS.of([1] * 8), KEYS.of([2] * 8)
    for keys in (old, new):
        pages = book.allocate(2) or ()
        book.commit(pages, keys)
        book.release(pages)
    assert book.counts() == counts(pages=4, free=0, cached=4)
    book.check_idle()
    taken = book.allocate(1) or ()
    assert (len(book.match(old)), len(book.match(new)), book.evicted) == (1, 2, 1)
    again = book.allocate(2, book.match(old)) or ()  # the old prefix is in use now, so the new one is evicted
    assert (len(book.match(old)), len(book.match(new))) == (1, 1)
    book.release(taken)
    book.release(again)
    book.check_idle()
    assert book.drop_cache() == 2
    assert book.counts() == counts(pages=4, free=4)


def test_shared_pages_do_not_count_as_room_for_others() -> None:
    book = PageBook(4)
    keys = KEYS.of([1] * 8)
    pages = book.allocate(2) or ()
    book.commit(pages, keys)
    book.release(pages)
    assert book.allocate(5, book.match(keys)) is None
    assert book.counts() == counts(pages=4, free=2, cached=2)
    assert (book.allocate(4, book.match(keys)) or ())[:2] == pages


# -- leases ------------------------------------------------------------------------------------------------------------


def take(pool: PagedPool, tokens: Sequence[int], *, spare: int = 0) -> Lease:
    lease = Lease(pool)
    assert lease.take(len(tokens) + spare, KEYS.of(tokens))
    return lease


def test_prompts_that_begin_alike_share_what_is_filed_and_nothing_else() -> None:
    pool = make_pool()
    first = take(pool, [1] * 8 + [2] * 3)
    assert (first.shared, first.cached_tokens) == (0, 0)
    before_it_is_certain = take(pool, [1] * 8)
    assert not set(first.pages) & set(before_it_is_certain.pages)
    before_it_is_certain.drop()
    first.commit(KEYS.of([1] * 8 + [2] * 3))
    second = take(pool, [1] * 8 + [3] * 4)
    assert (second.shared, second.cached_tokens) == (2, 8)
    assert second.pages[:2] == first.pages[:2]
    pool.book.check_writable([first.pages[2], second.pages[2]])
    with pytest.raises(KVRoomError, match=rf"pages \[{first.pages[0]}\] are in the prefix index"):
        pool.book.check_writable([first.pages[0]])
    first.drop()
    assert pool.book.counts() == counts(free=5, owned=3)
    second.drop()
    assert pool.book.counts() == counts(free=6, cached=2)


def test_a_page_that_is_filed_already_stays_with_its_first_holder() -> None:
    pool = make_pool()
    one, two = take(pool, [1] * 4), take(pool, [1] * 4)
    for lease in (one, two):
        lease.commit(KEYS.of([1] * 4))
    pool.book.check_writable(two.pages)
    one.drop()
    two.drop()
    assert pool.book.counts() == counts(free=7, cached=1)
    pool.book.check_idle()


def test_a_dropped_lease_leaves_shared_pages_and_parks_those_that_its_room_was_told_of() -> None:
    pool = make_pool()
    first = take(pool, [1] * 8)
    first.commit(KEYS.of([1] * 8))
    second = take(pool, [1] * 8, spare=8)
    second.attach_room(second.shared)
    second.drop()
    first.drop()
    assert pool.book.counts() == counts(free=4, cached=2, quarantined=2)
    second.detach_room()
    assert pool.book.counts() == counts(free=6, cached=2)


def test_a_page_that_a_room_still_reads_is_not_evicted_and_may_be_shared() -> None:
    pool = make_pool(pages=2)
    reader = take(pool, [1] * 8)
    reader.commit(KEYS.of([1] * 8))
    reader.attach_room()
    reader.drop()
    assert Lease(pool).take(1) is False
    other = take(pool, [1] * 8)
    assert other.pages == reader.pages
    other.drop()
    assert pool.book.counts() == counts(pages=2, free=0, quarantined=2)
    reader.detach_room()
    assert pool.book.counts() == counts(pages=2, free=0, cached=2)
    assert Lease(pool).take(1)


@given(st.lists(st.sampled_from(["take", "attach_room", "detach_room", "drop"]), max_size=12))
def test_a_lease_returns_its_pages_when_neither_side_holds_them(events: list[str]) -> None:
    pool = make_pool()
    lease = Lease(pool)
    taken = lent = dropped = False
    for event in events:
        if event == "take" and not taken and not dropped:
            taken = lease.take(12)
        elif event == "attach_room" and not dropped:
            lease.attach_room()
            lent = True
        elif event == "detach_room":
            lease.detach_room()
            lent = False
        elif event == "drop":
            lease.drop()
            dropped = True
        held = 3 * taken
        expected = (held, 0) if not dropped else (0, held if lent else 0)
        assert (pool.book.counts().owned, pool.book.counts().quarantined) == expected
        pool.book.check()
    lease.detach_room()
    lease.drop()
    pool.book.check_idle()


class Requests(RuleBasedStateMachine):
    """Leases in any order. The model records the content of each page and the leases that use it."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(pages=6)
        self.open: dict[Lease, tuple[int, ...]] = {}  # pages that may be read, and their tokens
        self.lent: dict[Lease, list[int]] = {}  # pages that a room may write or read
        self.written: dict[int, tuple[int, ...]] = {}  # all tokens up to the end of the page

    @rule(target=leases, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def take(self, tokens: list[int]) -> Lease:
        lease = Lease(self.pool)
        held = {page for other in self.open for page in other.pages} | {p for ps in self.lent.values() for p in ps}
        if lease.take(len(tokens), KEYS.of(tokens)):
            assert not held & set(lease.pages[lease.shared :]), "a page was given out that is held"
            self.open[lease] = tuple(tokens)
            for index, page in enumerate(lease.pages):
                if index < lease.shared:
                    assert self.written[page] == tuple(tokens[: index * 4 + 4]), "a shared page holds something else"
                else:
                    self.pool.book.check_writable([page])
                    self.written[page] = tuple(tokens[: index * 4 + 4])
        return lease

    @rule(lease=leases)
    def attach_room(self, lease: Lease) -> None:
        if lease in self.open and lease not in self.lent:
            lease.attach_room(lease.shared)
            self.lent[lease] = list(lease.pages[lease.shared :])

    @rule(lease=leases)
    def commit(self, lease: Lease) -> None:
        if lease in self.open:
            lease.commit(KEYS.of(self.open[lease]))

    @rule(lease=leases)
    def detach_room(self, lease: Lease) -> None:
        lease.detach_room()
        self.lent.pop(lease, None)

    @rule(lease=consumes(leases))
    def drop(self, lease: Lease) -> None:
        lease.drop()
        self.open.pop(lease, None)
        lease.detach_room()
        self.lent.pop(lease, None)

    @rule(lease=leases)
    def drop_before_the_room_is_done(self, lease: Lease) -> None:
        lease.drop()
        self.open.pop(lease, None)

    @invariant()
    def every_page_has_the_holder_that_it_should_have(self) -> None:
        owned = {page for lease in self.open for page in lease.pages}
        parked = {page for lease, pages in self.lent.items() if lease not in self.open for page in pages} - owned
        self.pool.book.check()
        now = self.pool.book.counts()
        assert (now.owned, now.quarantined) == (len(owned), len(parked))


TestRequests = Requests.TestCase

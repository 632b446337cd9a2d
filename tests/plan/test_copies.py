"""Plans against the oracle: every byte of the window once, from the right place, in the fewest blocks."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smallpools import dense, pool, rows, shard

from kvroom.errors import PlanError
from kvroom.plan import Blocks, KVLayout, KVRegion, Planner, array_regions, check_pages, copies, extents
from kvroom_lab import oracle
from sampling import amount

# No deadline: a busy machine must not fail a plan.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Model(NamedTuple):
    """The properties that both sides agree on: heads of each layer, components, bytes of a head."""

    heads: dict[int, int]
    components: list[str]
    head_bytes: int


class Case(NamedTuple):
    source: KVLayout
    target: KVLayout
    source_pages: list[int]
    target_pages: list[int]
    start: int
    stop: int
    source_start: int
    target_start: int

    def copies(self) -> Blocks:
        return copies(
            self.source,
            self.target,
            self.source_pages,
            self.target_pages,
            self.start,
            self.stop,
            source_start=self.source_start,
            target_start=self.target_start,
        )

    def expected(self) -> dict[int, int]:
        return oracle.expected_bytes(
            self.source,
            self.target,
            self.source_pages,
            self.target_pages,
            self.start,
            self.stop,
            source_start=self.source_start,
            target_start=self.target_start,
        )


@st.composite
def models(draw: st.DrawFn) -> Model:
    heads = draw(st.dictionaries(st.integers(0, 4), st.integers(1, 4), min_size=1, max_size=3))
    if draw(st.booleans()):
        heads = dict.fromkeys(heads, max(heads.values()))
    return Model(heads, draw(st.sampled_from([["k", "v"], ["latent"], ["v", "x", "k"]])), draw(st.integers(1, 3)))


@st.composite
def layouts(draw: st.DrawFn, model: Model, shared: int, page_tokens: int, pages: int) -> KVLayout:
    """One rank's part of a model: some layers, some heads, but head 0 of layer `shared` for sure; any arrangement."""
    layers = draw(st.sets(st.sampled_from(sorted(model.heads))).map(lambda chosen: sorted(chosen | {shared})))
    if len({model.heads[layer] for layer in layers}) == 1 and draw(st.booleans()):
        groups = [layers]
    else:
        groups = [[layer] for layer in draw(st.permutations(layers))]
    regions: list[KVRegion] = []
    end = draw(st.integers(0, 3))
    for group in groups:
        most = model.heads[group[0]]
        first = 0 if shared in group else draw(st.integers(0, most - 1))
        heads = draw(st.integers(first + 1, most)) - first
        for components in [model.components] if draw(st.booleans()) else [[name] for name in model.components]:
            axes = draw(st.sampled_from(["LCPTH", "LPCTH", "PLCTH", "LCPHT", "LPTCH", "PLTHC", "TPLHC"])) + "D"
            counts = (len(group), len(components), pages, page_tokens, heads, model.head_bytes)
            padding = draw(st.sampled_from([[0] * 6, [0, 1, 0, 2, 0, 1], [0, 0, 0, 0, 3, 0]]))
            sizes = dict(zip("LCPTHD", counts, strict=True))
            named: dict[str, Any] = {"layers": group, "components": components, "first_head": first}
            more, end = dense(end, axes, sizes, padding, **named)
            regions += more
    return KVLayout(tuple(regions), "int8")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two ranks of one model, a window, and for each side a page list that may begin before the window."""
    model = draw(models())
    shared = draw(st.sampled_from(sorted(model.heads)))
    start = draw(st.integers(0, 12))
    stop = start + draw(st.integers(0, 14))
    sides: list[tuple[KVLayout, list[int], int]] = []
    for _ in range(2):
        page_tokens = draw(st.sampled_from([1, 2, 3, 4, 6]))
        begin = draw(st.just(start) | st.integers(0, start))
        count = -(-stop // page_tokens) - begin // page_tokens if stop > begin else 0
        spare = draw(st.integers(0 if count else 1, 2))
        first = draw(st.integers(0, spare))
        pages = draw(st.just(list(range(first, first + count))) | st.permutations(range(count + spare)))[:count]
        sides.append((draw(layouts(model, shared, page_tokens, count + spare)), pages, begin))
    if draw(st.booleans()) and sides[0][0].page_tokens == sides[1][0].page_tokens and sides[0][2] == sides[1][2]:
        sides[1] = sides[0]
    (source, source_pages, source_start), (target, target_pages, target_start) = sides
    return Case(source, target, source_pages, target_pages, start, stop, source_start, target_start)


@settings(patient, max_examples=amount(100, full=400))
@given(cases())
def test_every_byte_is_written_once_from_its_source_in_maximal_blocks(case: Case) -> None:
    blocks = case.copies()
    assert [column.dtype for column in blocks] == [np.uint64] * 3
    assert oracle.moved_bytes(blocks) == case.expected()
    assert oracle.joinable(blocks) == []
    assert (blocks.dst[1:] > blocks.dst[:-1]).all()


@settings(patient, max_examples=amount(75, full=300))
@given(cases())
def test_extents_are_the_bytes_of_the_window_sorted_and_merged(case: Case) -> None:
    keywords: dict[str, Any] = {"pages_start": case.target_start}
    every = [
        span
        for token in range(case.start, case.stop)
        for span in oracle.elements(case.target, case.target_pages, case.target_start, token).values()
    ]
    granted = extents(case.target, case.target_pages, case.start, case.stop, **keywords)
    assert oracle.as_ranges(granted) == oracle.union([s.start for s in every], [len(s) for s in every])
    planner = Planner(case.source, case.target)
    written = planner.extents(case.target_pages, case.start, case.stop, **keywords)
    blocks = case.copies()
    assert oracle.as_ranges(written) == oracle.union(blocks.dst.tolist(), blocks.length.tolist())


@settings(patient, max_examples=amount(50, full=200))
@given(cases(), st.data())
def test_any_chunking_moves_the_same_bytes(case: Case, data: st.DataObject) -> None:
    middle = data.draw(st.integers(case.start, case.stop))
    planner = Planner(case.source, case.target)
    moved: dict[int, int] = {}
    for start, stop in [(case.start, middle), (middle, case.stop)]:
        source_count = case.source.window_pages(case.source_start, stop)
        target_count = case.target.window_pages(case.target_start, stop)
        part = planner.copies(
            case.source_pages[:source_count],
            case.target_pages[:target_count],
            start,
            stop,
            source_start=case.source_start,
            target_start=case.target_start,
        )
        for dst, src in oracle.moved_bytes(part).items():
            assert moved.setdefault(dst, src) == src
    assert moved == case.expected()


def named_pool(axes: str, sizes: dict[str, int]) -> tuple[npt.NDArray[np.int32], KVLayout]:
    """A pool in real memory, as a view with its axes in the order LCPTHD, and its layout."""
    array = np.zeros([sizes[axis] for axis in axes], np.int32)
    regions = array_regions(array.ctypes.data, array.shape, array.strides, axes, itemsize=4, layers=range(sizes["L"]))
    return array.transpose([axes.index(axis) for axis in "LCPTHD"]), KVLayout(regions, "int32")


@pytest.mark.parametrize("source_axes", ["LCPTHD", "LCPHTD", "PLTCHD"])
@pytest.mark.parametrize("target_axes", ["LCPTHD", "LPCHTD", "LPTHCD"])
@pytest.mark.parametrize(("source_tokens", "target_tokens"), [(16, 16), (48, 32), (64, 16), (16, 64)])
def test_real_pools(source_axes: str, target_axes: str, source_tokens: int, target_tokens: int) -> None:
    """Tokens [37, 201) of a request whose first 37 tokens the target has. NumPy indexing gives the expected bytes."""
    rng = np.random.default_rng(source_tokens * 100 + target_tokens)
    sizes = {"L": 3, "C": 2, "P": 15, "H": 2, "D": 4}
    source, source_layout = named_pool(source_axes, sizes | {"T": source_tokens})
    target, target_layout = named_pool(target_axes, sizes | {"T": target_tokens})
    source[...] = np.arange(1, source.size + 1).reshape(source.shape)
    source_pages = rng.permutation(15)[: source_layout.window_pages(0, 201)]
    target_pages = rng.permutation(15)[: target_layout.window_pages(37, 201)]
    blocks = copies(source_layout, target_layout, source_pages, target_pages, 37, 201, source_start=0)
    assert blocks.nbytes == source_layout.window_nbytes(37, 201)
    for src, dst, length in zip(*(column.tolist() for column in blocks), strict=True):
        ctypes.memmove(dst, src, length)
    expected = np.zeros_like(target)
    for token in range(37, 201):
        target_page = target_pages[token // target_tokens - 37 // target_tokens]
        source_page = source_pages[token // source_tokens]
        expected[:, :, target_page, token % target_tokens] = source[:, :, source_page, token % source_tokens]
    assert (target == expected).all()


def test_one_page_of_equal_layouts_is_one_block_for_each_layer_and_component() -> None:
    page, region = 4 * 24, 8 * 4 * 24
    blocks = copies(pool(), pool(base=10**6), [2], [5], 0, 4)
    assert rows(blocks) == [(i * region + 2 * page, 10**6 + i * region + 5 * page, page) for i in range(4)]


@pytest.mark.parametrize(
    ("source_axes", "target_axes", "start", "stop", "source_pages", "target_pages", "count"),
    [
        ("LCPTHD", "LCPTHD", 0, 12, [1, 2, 3], [4, 5, 6], 4),  # consecutive pages join
        ("LCPTHD", "LCPTHD", 0, 12, [1, 2, 3], [6, 5, 4], 12),  # consecutive on one side only
        ("LCPTHD", "LCPTHD", 0, 12, [3, 2, 1], [6, 5, 4], 4),  # in reverse on both sides
        ("LCPTHD", "LCPTHD", 0, 8, [7, 0], [7, 0], 5),  # the last page of a region touches the next one's first
        ("LCPTHD", "LCPTHD", 2, 10, [0, 1, 2], [0, 1, 2], 4),  # partial pages join too
        ("LPCTHD", "LPCTHD", 0, 4, [1], [2], 2),  # K and V of a page are neighbours
        ("LPTCHD", "LPTCHD", 1, 3, [1], [2], 2),  # K and V of a token are neighbours
        ("PLCTHD", "PLCTHD", 0, 4, [1], [2], 1),  # a page holds all layers
        ("PLCTHD", "PLCTHD", 0, 3, [1], [2], 4),
        ("PLCTHD", "PLCTHD", 0, 8, [1, 2], [4, 5], 1),
        ("LCPHTD", "LCPHTD", 0, 4, [1], [2], 4),  # head-major: a full page is one block, a part is one a head
        ("LCPHTD", "LCPHTD", 0, 3, [1], [2], 12),
        ("LCPTHD", "LCPHTD", 0, 4, [1], [2], 48),  # token-major to head-major: every element by itself
        ("LCPTHD", "PLCTHD", 0, 4, [1], [2], 4),
    ],
)
def test_blocks_are_as_few_as_the_arrangement_allows(
    source_axes: str,
    target_axes: str,
    start: int,
    stop: int,
    source_pages: list[int],
    target_pages: list[int],
    count: int,
) -> None:
    blocks = copies(pool(source_axes), pool(target_axes), source_pages, target_pages, start, stop)
    assert (len(rows(blocks)), blocks.nbytes) == (count, (stop - start) * 96)


@pytest.mark.parametrize("target_axes", ["LCPTHD", "LCPHTD"])
@pytest.mark.parametrize("target_tokens", [2, 3])
def test_long_requests(target_axes: str, target_tokens: int) -> None:
    """Runs of one kind in a row are planned together; with pages of 3 and of 2 tokens the kind changes all the time."""
    sizes: dict[str, Any] = {"L": 1, "C": 2, "H": 2, "D": 1}
    source, target = pool(T=3, P=40, **sizes), pool(target_axes, T=target_tokens, P=60, **sizes)
    rng = np.random.default_rng(target_tokens)
    case = Case(source, target, rng.permutation(40)[:34].tolist(), rng.permutation(60)[:51].tolist(), 1, 101, 1, 1)
    case = case._replace(target_pages=case.target_pages[: target.window_pages(1, 101)])
    blocks = case.copies()
    assert oracle.moved_bytes(blocks) == case.expected()
    assert oracle.joinable(blocks) == []


def test_pages_of_48_tokens_go_to_pages_of_32() -> None:
    source, target = pool(L=1, T=48), pool(L=1, T=32, base=10**6)
    blocks = copies(source, target, [3, 0], [1, 4, 7], 0, 96)
    k = [(3 * 48, 1 * 32, 32), (3 * 48 + 32, 4 * 32, 16), (0, 4 * 32 + 16, 16), (16, 7 * 32, 32)]
    assert rows(blocks)[:4] == [(24 * src, 10**6 + 24 * dst, 24 * tokens) for src, dst, tokens in k]


def test_pages_that_lie_in_each_others_gaps_at_different_strides() -> None:
    """Page 0 of layer 1 follows page 0 of layer 0 on both sides; their other pages are not neighbours."""
    one, other = pool(L=2, C=2, T=1, H=1, P=2).regions[:2]
    k = msgspec.structs.replace(one, base=0, page_stride=20)
    v = msgspec.structs.replace(other, base=8, page_stride=30)
    gaps = KVLayout((k, v), "int8")
    assert rows(copies(gaps, gaps, [0], [0], 0, 1)) == [(0, 0, 16)]
    assert rows(copies(gaps, gaps, [1], [1], 0, 1)) == [(20, 20, 8), (38, 38, 8)]


def test_addresses_use_all_64_bits() -> None:
    size = 2 * 2 * 8 * 4 * 24
    high = pool(base=2**64 - 1 - size)
    blocks = copies(high, high, [7], [0], 1, 2)
    assert rows(blocks)[-1] == (2**64 - 1 - 96 + 24, 2**64 - 1 - 8 * 96 + 24, 24)
    assert rows(copies(high, pool(), list(range(8)), list(range(8)), 0, 32)) == [(2**64 - 1 - size, 0, size)]


@pytest.mark.parametrize("pages_type", [tuple, np.array, lambda pages: np.array(pages, np.uint8)])
def test_pages_may_be_any_sequence_of_ints(pages_type: Any) -> None:
    pages = pages_type([2, 3])
    assert rows(copies(pool(), pool(), pages, pages, 0, 8)) == rows(copies(pool(), pool(), [2, 3], [2, 3], 0, 8))


@pytest.mark.parametrize(
    ("start", "source_start", "source_pages"), [(0, 0, []), (6, 6, []), (4, 0, [3]), (6, 3, [3, 1])]
)
def test_an_empty_window_has_no_blocks(start: int, source_start: int, source_pages: list[int]) -> None:
    blocks = copies(pool(), pool(), source_pages, [], start, start, source_start=source_start)
    assert rows(blocks) == []
    assert blocks.nbytes == 0
    assert [column.dtype for column in blocks] == [np.uint64] * 3
    assert oracle.as_ranges(extents(pool(), source_pages, start, start, pages_start=source_start)) == []


ONE_PAGE: dict[str, Any] = {"source_pages": [0], "target_pages": [0], "start": 0, "stop": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 5}, r"tokens \[5, 4\) with source pages from token 5; 0 <= first token of the pages <= start"),
        ({"start": 2**63, "stop": 2**63 + 1}, r"start <= stop <= 281474976710656 is required"),
        ({"start": -1}, r"tokens \[-1, 4\) with source pages from token -1"),
        ({"start": 1, "source_start": 2}, r"tokens \[1, 4\) with source pages from token 2"),
        ({"start": 1, "target_start": -1}, r"tokens \[1, 4\) with target pages from token -1"),
        ({"source_pages": []}, r"0 source pages given, but tokens \[0, 4\) take 1 pages of 4 tokens"),
        ({"source_pages": [0, 1]}, r"2 source pages given, but tokens \[0, 4\) take 1 pages of 4 tokens"),
        ({"target_pages": [0, 1]}, r"2 target pages given, but tokens \[0, 4\) take 1 pages of 4 tokens"),
        ({"stop": 5, "source_pages": [0, 1]}, r"1 target pages given, but tokens \[0, 5\) take 2 pages of 4 tokens"),
        ({"start": 3, "stop": 5, "source_pages": [0, 1]}, r"1 target pages given, but tokens \[3, 5\) take 2 pages"),
        ({"start": 4, "source_start": 0, "target_start": 0, "target_pages": []}, r"0 target .* tokens \[0, 4\) take 1"),
        ({"start": 4}, r"1 source pages given, but tokens \[4, 4\) take 0 pages"),
        ({"source_pages": [8]}, r"source page 8 is not in the source's pool of pages \[0, 8\)"),
        ({"target_pages": [-1]}, r"target page -1 is not in the target's pool of pages \[0, 8\)"),
        ({"target_pages": [2.0]}, r"target pages of type float64 and shape \(1,\); give a list of ints"),
        ({"source_pages": [True]}, "source pages of type bool"),
        ({"source_pages": [2**70]}, "source pages of type object"),
        ({"source_pages": [[0]]}, r"source pages of type int64 and shape \(1, 1\)"),
        ({"stop": 8, "source_pages": [0, 1], "target_pages": [3, 3]}, "target page 3 occurs twice; each page can hold"),
    ],
)
def test_pages_that_do_not_fit_the_window_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        copies(pool(), pool(base=10**6), **(ONE_PAGE | changes))


def test_extents_refuse_what_copies_refuse() -> None:
    with pytest.raises(PlanError, match=r"1 target pages given, but tokens \[0, 5\) take 2 pages"):
        extents(pool(), [0], 0, 5)
    with pytest.raises(PlanError, match="target page 1 occurs twice"):
        extents(pool(), [1, 1], 0, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (shard(dtype="bfloat16"), "source has dtype 'bfloat16' and model '', target has dtype 'int8' and model ''"),
        (shard(model="m"), "source has dtype 'int8' and model 'm', target has dtype 'int8' and model ''; start both"),
        (
            shard(D=16),
            r"source layer 0 'k' heads \[0, 4\) has 16 bytes a head, target layer 0 'k' .* has 8 bytes a head;",
        ),
        (shard(layers=[2, 3]), r"nothing to copy: the source holds layers 2 to 3, components \['k', 'v'\], heads"),
        (
            shard(components=["conv", "ssm"]),
            r"holds layers 0 to 1, components \['conv', 'ssm'\], heads \[\[0, 4\]\], t",
        ),
        (shard(heads=(4, 6)), r"heads \[\[4, 6\]\], the target holds layers 0 to 1, .* heads \[\[0, 4\]\]; connect"),
    ],
)
def test_layouts_that_cannot_be_copied_are_refused(source: KVLayout, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Planner(source, shard())


def test_a_planner_keeps_a_bounded_number_of_stencils_and_plans_the_same_after_dropping_them() -> None:
    planner = Planner(pool(T=32), pool(T=32))
    for start in range(32):
        for stop in range(start + 1, 33):
            blocks = planner.copies([1], [2], start, stop)
            assert len(rows(blocks)) == 4
            assert blocks.nbytes == (stop - start) * 96
            assert 0 < len(planner._pairs[""].copies._stencils) <= 128


def test_a_planner_does_not_keep_huge_stencils() -> None:
    planner = Planner(pool(L=32, T=64), pool("LCPHTD", L=32, T=64))
    blocks = planner.copies([1], [2], 0, 64)
    assert len(rows(blocks)) == 32 * 2 * 64 * 3
    assert planner._pairs[""].copies._stencils == {}


@pytest.mark.parametrize(
    ("pages", "start", "stop", "wrong"),
    [
        ([1, 2], 0, 4, "2 source pages given, but tokens \\[0, 4\\) take 1 pages"),
        ([], 0, 4, "0 source pages given"),
        ([8], 0, 4, "source page 8 is not in the source's pool of pages \\[0, 8\\)"),
        ([-1], 0, 4, "source page -1 is not in"),
        ([3, 3], 2, 6, "source page 3 occurs twice"),
        ([1.5], 0, 4, "give a list of ints"),
        ([1], 4, 2, "is required"),
    ],
)
def test_pages_are_checked_without_a_plan(pages: list[Any], start: int, stop: int, wrong: str) -> None:
    layout = KVLayout(array_regions(4096, (8, 4, 2), (8, 2, 1), "PTD", itemsize=1, components=("k",)), dtype="uint8")
    check_pages(layout, [7], 0, 4)
    check_pages(layout, [7, 0], 2, 6)
    check_pages(layout, [], 3, 3)
    with pytest.raises(PlanError, match=wrong):
        check_pages(layout, pages, start, stop)

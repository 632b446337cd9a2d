"""Every constructed layout is valid: the refused ones with their errors, and the accepted orders of axes."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroom.errors import LayoutError, PlanError
from kvroom.plan import KVGroup, KVLayout, KVRegion, MemoryRange, TokenSplit, array_regions
from kvroom_lab import oracle
from sampling import amount


def region(**changes: Any) -> KVRegion:
    """4 pages of 2 tokens, 3 heads of 8 bytes, dense, token-major, at address 1000."""
    fields: dict[str, Any] = {
        "layer": 0,
        "component": "k",
        "base": 1000,
        "pages": 4,
        "page_stride": 48,
        "page_tokens": 2,
        "token_stride": 24,
        "heads": 3,
        "head_stride": 8,
        "head_bytes": 8,
        "head_range": (0, 3),
    }
    return KVRegion(**(fields | changes))


def pool(axes: str, shape: tuple[int, ...], **keywords: Any) -> tuple[KVRegion, ...]:
    """Regions of a dense array of int16."""
    array = np.empty(shape, np.int16)
    return array_regions(array.ctypes.data, array.shape, array.strides, axes, itemsize=2, **keywords)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages": 0}, r"layer 0 'k' heads \[0, 3\): pages is 0; give an int of at least 1"),
        ({"page_tokens": -2}, "page_tokens is -2; give an int of at least 1"),
        ({"head_bytes": 0}, "head_bytes is 0; give an int of at least 1"),
        ({"heads": 0, "head_range": (0, 0)}, "heads is 0; give an int of at least 1"),
        ({"layer": -1}, "layer is -1; give an int of at least 0"),
        ({"base": 2**64}, "base is 18446744073709551616; give an int of at least 0, below 2"),
        ({"page_stride": np.int64(48)}, r"page_stride is .*48.*; give an int"),
        ({"page_tokens": 2**20 + 1}, "page_tokens is 1048577; at most 1048576"),
        ({"pages": 2**32 + 1}, "pages is 4294967297; at most 4294967296"),
        ({"head_range": (0, 4)}, "heads is 3, head_range \\[0, 4\\); give a half-open range of that length"),
        ({"head_range": (-1, 2)}, "heads is 3, head_range .*; give a half-open range"),
        ({"component": ""}, "component and device must be 1 to 256 characters"),
        ({"device": "d" * 257}, "component and device must be 1 to 256 characters"),
        ({"group": "g" * 257}, "group 'g+' and format '' must be at most 256 characters"),
        ({"format": "f" * 257}, "group '' and format 'f+' must be at most 256 characters"),
        ({"span": 0}, "span is 0; give an int of at least 1"),
        ({"span": 3}, "page_tokens is 2; give a multiple of span 3"),
        ({"head_stride": 7}, "a stride of 7 bytes steps into the 8 bytes that lie within one step"),
        ({"token_stride": 23}, "a stride of 23 bytes steps into the 24 bytes"),
        ({"page_stride": 47}, r"a stride of 47 bytes steps into the 48 bytes .*page_stride 47, token_stride 24"),
        ({"page_stride": 0}, "strides are in bytes and must nest"),
        ({"base": 2**64 - 192}, "ends at address 0x10000000000000000, beyond 64 bits; check base"),
    ],
)
def test_an_unsound_region_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        region(**changes)


def test_a_region_may_end_at_the_last_address() -> None:
    assert region(base=2**64 - 193).extent == 192


def test_the_stride_of_an_axis_of_length_one_has_no_meaning() -> None:
    assert region(pages=1, page_stride=0, heads=1, head_stride=0, head_range=(2, 3)).extent == 32


V = {"component": "v", "base": 2000}


@pytest.mark.parametrize(
    ("regions", "dtype", "model", "message"),
    [
        ([], "int8", "", "the layout has 0 regions; give 1 to 4096"),
        ([region()], "", "", "dtype must be given"),
        ([region()], "int8", "m" * 257, "both at most 256 characters"),
        ([region(), region(**V, page_tokens=1)], "int8", "", r"layer 0 'v' .*: page_tokens is 1, but 2 in layer 0 'k'"),
        ([region(), region(**V, pages=3)], "int8", "", "pages is 3, but 4 in layer 0 'k'"),
        (
            [region(**V), region(layer=1, page_stride=800, device="cuda:0"), region(layer=2, base=1100)],
            "int8",
            "",
            r"layer 1 'k' .* on 'cuda:0' and layer 2 'k' .* on 'cpu' have the same addresses; check their bases",
        ),
        ([region(), region(base=2000)], "int8", "", "declare the same heads; declare each head once"),
        ([region(), region(base=2000, head_range=(2, 5))], "int8", "", r"heads \[0, 3\) and .* heads \[2, 5\) declare"),
        ([region(), region(**V | {"base": 1191})], "int8", "", "layer 0 'k' .* and layer 0 'v' .* share memory"),
        ([region(), region(**V | {"base": 1048})], "int8", "", "share memory"),
        ([region(), region(**V | {"base": 1000})], "int8", "", "share memory"),
    ],
)
def test_an_unsound_layout_is_refused(regions: list[KVRegion], dtype: str, model: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        KVLayout(tuple(regions), dtype, model)


def test_an_interleaving_that_cannot_be_followed_is_refused() -> None:
    """Pages of one region lie in the gaps of the other, but no stride is common: not shown to be disjoint."""
    gaps = {"pages": 3, "page_tokens": 1, "heads": 1, "head_range": (0, 1), "head_bytes": 1}
    with pytest.raises(LayoutError, match="or interleave and cannot be shown to be free of overlap; check"):
        KVLayout((region(**gaps, base=0, page_stride=10), region(**gaps, component="v", base=2, page_stride=7)), "int8")


def test_strides_made_up_to_keep_the_check_busy_are_refused() -> None:
    """Each region needs a fold of its own; a peer's layout must not cost a recursion without end."""
    one = {"pages": 2, "page_tokens": 1, "heads": 1, "head_range": (0, 1), "head_bytes": 1}
    regions = [region(**one, layer=i, base=2 * i, page_stride=10**6 - i) for i in range(4096)]
    with pytest.raises(LayoutError, match="cannot be shown to be free of overlap"):
        KVLayout(tuple(regions), "int8")


def addresses(one: KVRegion) -> list[int]:
    """Every byte of a region, element by element."""
    return [
        one.base + p * one.page_stride + t * one.token_stride + h * one.head_stride + i
        for p in range(one.pages)
        for t in range(one.page_tokens)
        for h in range(one.heads)
        for i in range(one.head_bytes)
    ]


def loose_region(component: str) -> st.SearchStrategy[KVRegion]:
    """A region with small numbers, many of which contradict each other; `LayoutError` is for the caller to catch."""
    small = st.integers(1, 3)
    stride = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24])
    return st.builds(
        lambda **f: msgspec.structs.replace(region(), component=component, head_range=(0, f["heads"]), **f),
        base=st.integers(0, 60),
        pages=st.just(2),
        page_stride=stride,
        page_tokens=st.just(2),
        token_stride=stride,
        heads=small,
        head_stride=stride,
        head_bytes=small,
    )


@settings(max_examples=amount(200, full=600))
@given(st.data())
def test_what_is_accepted_has_no_byte_twice(data: st.DataObject) -> None:
    try:
        regions = tuple(data.draw(loose_region(name)) for name in "kvw")
        layout = KVLayout(regions, "int8")
    except LayoutError:
        return
    every = [at for one in layout.regions for at in addresses(one)]
    assert len(every) == len(set(every))


@given(
    axes=st.permutations("LCPTH").map("".join),
    sizes=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    padding=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    shift=st.integers(0, 2),
)
def test_a_pool_with_axes_in_any_order_is_accepted(axes: str, sizes: list[int], padding: list[int], shift: int) -> None:
    strides = [2, 1]
    for count, pad in zip(sizes[::-1], padding, strict=True):
        strides.insert(0, strides[0] * count + pad)
    shape = dict(zip(axes, sizes, strict=True))
    regions = array_regions(
        shift,
        [*sizes, 2],
        strides[1:],
        axes + "D",
        itemsize=1,
        layers=range(shape["L"]),
        components=["k", "v", "w"][: shape["C"]],
    )
    layout = KVLayout(regions, "int8")
    every = [at for one in layout.regions for at in addresses(one)]
    assert len(set(every)) == len(every) == 2 * math.prod(sizes)


def test_regions_of_an_array_lie_where_its_elements_lie() -> None:
    array = np.empty((2, 5, 2, 4, 3, 8), np.float32)
    regions = array_regions(
        array.ctypes.data, array.shape, array.strides, "LPCTHD", itemsize=4, layers=[7, 9], first_head=6
    )
    assert [(r.layer, r.component) for r in regions] == [(7, "k"), (7, "v"), (9, "k"), (9, "v")]
    last = regions[3]
    assert (last.pages, last.page_tokens, last.heads, last.head_bytes) == (5, 4, 3, 32)
    assert (last.head_range, last.device) == ((6, 9), "cpu")
    at = last.base + 3 * last.page_stride + 2 * last.token_stride + 1 * last.head_stride
    assert at == array[1, 3, 1, 2, 1].ctypes.data


def test_a_latent_cache_has_one_head() -> None:
    (only,) = pool("PTD", (5, 4, 9), components=["latent"])
    assert (only.component, only.heads, only.head_range, only.head_bytes) == ("latent", 1, (0, 1), 18)


@pytest.mark.parametrize(
    ("axes", "shape", "keywords", "message"),
    [
        ("PTDX", (2, 2, 2, 2), {}, "axes 'PTDX' for shape .*; give one letter of LCPTHD for each axis"),
        ("PPTD", (2, 2, 2, 2), {}, "each letter once"),
        ("PTD", (2, 2, 2, 2), {}, "give one letter"),
        ("PTH", (2, 2, 2), {}, "P and D at least"),
        ("LCPTD", (3, 2, 2, 2, 2), {}, r"holds 3 layers and 2 components .*, but 1 layers and 2 components \('k', 'v'"),
        ("PTD", (2, 2, 2), {}, "holds 1 layers and 1 components"),
        ("PTDH", (2, 2, 2, 3), {"components": ["k"]}, "lanes are 6 bytes apart, itemsize is 2; lanes must be contig"),
    ],
)
def test_an_array_that_is_not_a_pool_is_refused(
    axes: str, shape: tuple[int, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        pool(axes, shape, **keywords)


def test_sizes_of_windows() -> None:
    layout = KVLayout(pool("CPTHD", (2, 5, 4, 3, 8)), "int16")
    assert (layout.page_tokens, layout.pages) == (4, 5)
    assert layout.window_nbytes(3, 10) == 7 * 96
    windows = [(0, 0), (3, 3), (0, 4), (0, 5), (3, 5), (4, 8), (7, 17)]
    assert [layout.window_pages(*window) for window in windows] == [0, 0, 1, 2, 2, 1, 4]


def test_memory_joins_what_touches_or_interleaves_and_nothing_else() -> None:
    k = region()  # [1000, 1192)
    touching = region(component="v", base=1192)
    apart = region(layer=1, base=2000, device="cpu")
    assert KVLayout((apart, touching, k), "int8").memory() == (MemoryRange(1000, 384), MemoryRange(2000, 192))
    fused = KVLayout(pool("PTCHD", (5, 4, 2, 3, 8)), "int16")
    assert fused.memory() == (MemoryRange(fused.regions[0].base, 5 * 4 * 2 * 3 * 16),)
    nested = (region(page_stride=400, base=1000), region(component="v", page_stride=400, base=1100))
    assert KVLayout(nested, "int8").memory() == (MemoryRange(1000, 1348),)
    device = KVLayout((region(device="cuda:1"),), "int8")
    assert device.memory() == (MemoryRange(1000, 192, "cuda:1"),)


def test_memory_is_joined_by_device() -> None:
    """Layers on two GPUs and on the host: each range has one device, whatever the order of the regions."""
    regions = [
        region(layer=0, base=5000, device="cuda:0"),
        region(layer=1, base=5192, device="cuda:1"),
        region(layer=2, base=5384, device="cuda:1"),
        region(layer=3, base=1000),
        region(layer=4, base=1192),
        region(layer=5, base=9000, device="cuda:0"),
    ]
    wanted = (
        MemoryRange(1000, 384, "cpu"),
        MemoryRange(5000, 192, "cuda:0"),
        MemoryRange(5192, 384, "cuda:1"),
        MemoryRange(9000, 192, "cuda:0"),
    )
    for order in (regions, regions[::-1], regions[3:] + regions[:3]):
        assert KVLayout(tuple(order), "int8").memory() == wanted


@pytest.mark.parametrize("turned", [False, True])
def test_devices_do_not_interleave(turned: bool) -> None:
    """No byte is declared twice, but one address range has two devices, so no transport could register it."""
    one, other = region(page_stride=400), region(component="v", page_stride=400, base=1192, device="cuda:0")
    with pytest.raises(LayoutError, match=r"'k' .* on 'cpu' and .* 'v' .* on 'cuda:0' have the same addresses"):
        KVLayout((other, one) if turned else (one, other), "int8")


def test_a_device_does_not_lie_in_a_gap_of_another() -> None:
    """Between the two in order of address comes a region that ends before the third begins."""
    wide, short = region(page_stride=1000), region(layer=1, base=1100)
    with pytest.raises(LayoutError, match=r"layer 0 .* on 'cpu' and layer 2 .* on 'cuda:0' have the same addresses"):
        KVLayout((wide, short, region(layer=2, base=1400, device="cuda:0")), "int8")


def test_a_layout_travels_as_msgpack_and_is_checked_on_arrival() -> None:
    layout = KVLayout((region(base=2**64 - 193), region(component="v", device="cpu")), "int8", "model 1")
    packed = msgspec.msgpack.encode(layout)
    assert msgspec.msgpack.decode(packed, type=KVLayout) == layout
    forged = msgspec.msgpack.decode(packed)
    forged["regions"][1]["page_stride"] = 1
    with pytest.raises(LayoutError, match="a stride of 1 bytes steps into the 8 bytes"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(forged), type=KVLayout)
    forged["regions"][1]["page_stride"] = "48"
    with pytest.raises(msgspec.ValidationError, match="page_stride"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(forged), type=KVLayout)


def test_an_element_that_covers_the_page_needs_no_token_stride() -> None:
    assert region(span=2, token_stride=0, page_stride=24).extent == 3 * 24 + 24


SWA = KVGroup(name="swa", window=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": (SWA, KVGroup(name="swa"))},
            r"2 groups \['swa', 'swa'\]; give unique names, and 64 groups at most",
        ),
        ({"groups": tuple(KVGroup(name=f"g{i}") for i in range(65))}, "65 groups .*; give unique names"),
        (
            {"regions": (region(group="swa"),)},
            r"group 'swa' is not among the layout's groups \[\]; declare it with KVG",
        ),
        (
            {"regions": (region(span=2, token_stride=0),), "split": TokenSplit(rank=0, size=2, interleave=3)},
            "an element covers 2 tokens, but tokens interleave by 3; interleave by a multiple of the span",
        ),
        (
            {"regions": (region(group="swa"), region(**V, group="swa", page_tokens=1)), "groups": (SWA,)},
            "page_tokens is 1, but 2 in layer 0 'k' .*; all regions of a group must agree on it",
        ),
    ],
)
def test_groups_and_splits_that_contradict_the_regions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        KVLayout(**({"regions": (region(),), "dtype": "int8"} | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVGroup(name="", window=1), "a name must be 1 to 256 characters"),
        (lambda: KVGroup(name="g" * 257), "a name must be 1 to 256 characters"),
        (lambda: KVGroup(name="g", window=-1), r"group 'g': window is -1; give an int from 0 \(every token\)"),
        (lambda: KVGroup(name="g", window=2**48 + 1), "group 'g': window is 281474976710657"),
        (lambda: KVGroup(name="g", window=2.0), "group 'g': window is 2.0"),  # type: ignore[arg-type]
        (
            lambda: TokenSplit(rank=2, size=2),
            "invalid token split: rank 2 of 2, interleave 0; 0 <= rank < size <= 4096",
        ),
        (lambda: TokenSplit(rank=-1, size=2), "rank -1 of 2"),
        (lambda: TokenSplit(rank=0, size=4097), "rank 0 of 4097"),
        (lambda: TokenSplit(rank=0, size=2, interleave=-1), "interleave -1; .* and 0 <= interleave <= 1048576"),
        (lambda: TokenSplit(rank=0, size=2, interleave=2**20 + 1), "interleave 1048577"),
        (lambda: TokenSplit(rank=0, size=2, interleave=0.5), "interleave 0.5"),  # type: ignore[arg-type]
    ],
)
def test_unsound_groups_and_splits_are_refused(make: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make()


def grouped(split: TokenSplit | None = None) -> KVLayout:
    """A main group of 2 tokens a page, a window of 5 tokens in pages of 6 with scales for each 3, and a state."""
    window = [region(layer=1, base=2000, group="swa", page_tokens=6, page_stride=144)]
    scale = {"component": "k_scale", "span": 3, "heads": 1, "head_range": (0, 1), "head_bytes": 2, "token_stride": 2}
    window.append(region(layer=1, base=3000, group="swa", page_tokens=6, page_stride=4, **scale))
    state = region(layer=2, component="ssm", base=4000, group="state", pages=9, page_tokens=1, page_stride=24)
    groups = (SWA, KVGroup(name="state", window=1), KVGroup(name="elsewhere"))
    return KVLayout((state, *window, region()), "int8", groups=groups, split=split)


def test_each_group_has_pages_and_a_window_of_its_own() -> None:
    layout = grouped()
    assert (layout.page_tokens, layout.pages) == (2, 4)
    assert [layout.window_start(group, 11) for group in ("", "swa", "state", "elsewhere")] == [0, 6, 10, 0]
    assert [layout.window_start(group, 4) for group in ("", "swa", "state")] == [0, 0, 3]
    assert [layout.window_pages(6, 13, group) for group in ("", "swa", "state", "elsewhere")] == [4, 2, 7, 0]
    assert layout.window_nbytes(6, 11) == 5 * 24
    assert layout.window_nbytes(6, 11, "swa") == 5 * 24 + 2 * 2  # the last scale is taken whole
    assert layout.window_nbytes(10, 11, "state") == 24
    for ask in (layout.window_pages, layout.window_nbytes):
        with pytest.raises(
            PlanError, match=r"no group 'x' in the layout, which has \['', 'elsewhere', 'state', 'swa'\]"
        ):
            ask(0, 1, "x")
    with pytest.raises(PlanError, match="no group 'x'"):
        layout.window_start("x", 1)


def test_without_a_main_group_the_first_region_gives_the_page_size() -> None:
    layout = KVLayout((region(group="swa"),), "int8", groups=(SWA,))
    assert (layout.page_tokens, layout.pages, layout.window_pages(0, 9)) == (2, 4, 0)


splits = st.builds(
    lambda size, rank, interleave: TokenSplit(rank=rank % size, size=size, interleave=interleave),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 6),
)


@settings(max_examples=amount(100, full=400))
@given(splits, splits)
def test_two_splits_meet_if_they_hold_a_token_together(one: TokenSplit, other: TokenSplit) -> None:
    layouts = [KVLayout((region(),), "int8", split=split) for split in (one, other)]
    held = [set(oracle.held(layout, "", 2 * 5 * 6 * 5 * 6)) for layout in layouts]
    assert one.meets(other) == bool(held[0] & held[1])
    assert other.meets(one) == one.meets(other)


@settings(max_examples=amount(100, full=400))
@given(splits.filter(lambda split: split.interleave % 3 == 0), st.integers(0, 40), st.integers(0, 40))
def test_pages_and_bytes_of_a_split_are_those_of_its_own_tokens(split: TokenSplit, start: int, length: int) -> None:
    layout, stop = grouped(split), start + length
    own = [token for token in oracle.held(layout, "", stop) if token >= start]
    assert layout.window_nbytes(start, stop) == 24 * len(own)
    for group in ("", "swa", "state"):
        assert layout.window_pages(start, stop, group) == len(oracle.page_numbers(layout, group, start, stop))
        assert layout.window_start(group, stop) == (oracle.kept_from(layout, group, stop) if group else 0)


def test_an_array_without_tokens_has_one_element_a_page() -> None:
    states = pool("LPHD", (2, 5, 3, 8), layers=[4, 6], components=["ssm"], group="state")
    assert [(r.layer, r.pages, r.page_tokens, r.heads, r.group) for r in states] == [
        (4, 5, 1, 3, "state"),
        (6, 5, 1, 3, "state"),
    ]
    (page,) = pool("PD", (5, 32), components=["blob"], span=64, format="x")
    assert (page.page_tokens, page.span, page.heads, page.head_bytes, page.format) == (64, 64, 1, 64, "x")
    (scale,) = pool("PTD", (5, 4, 1), components=["k_scale"], span=16)
    assert (scale.page_tokens, scale.span, scale.token_stride, scale.page_stride) == (64, 16, 2, 8)


def test_groups_and_splits_travel_and_a_plain_layout_says_nothing_of_them() -> None:
    layout = grouped(TokenSplit(rank=1, size=2, interleave=6))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout) == layout
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(KVLayout((region(),), "int8")))
    assert set(plain) == {"regions", "dtype"}
    assert not {"group", "span", "format"} & set(plain["regions"][0])

"""What a rank's KV pool looks like in memory.

The law: a layout that exists is sound. Sizes are positive, addresses fit in 64 bits, and no two elements of one group
share a byte; `LayoutError` at construction otherwise. Decoding a layout that a peer sent constructs it, so it is
checked alike.

Everything is bases and strides in bytes. Token-major or head-major, K and V fused or apart, one tensor per layer or
one for all: the numbers differ, the code does not. Layers of a draft model are more layers, with numbers or component
names that the model's own layers do not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec

from kvroom.errors import LayoutError, PlanError

from .blocks import MemoryRange
from .overlap import Box, clash
from .tokens import MAX_NAME_CHARS, KVGroup, PageTable, TokenSplit

ADDRESS_END = 2**64
MAX_PAGES = 2**32
MAX_PAGE_TOKENS = 2**20
MAX_REGIONS = 4096
MAX_GROUPS = 64

_POSITIVE = ("pages", "page_tokens", "heads", "head_bytes", "span")
_NOT_NEGATIVE = ("layer", "base", "page_stride", "token_stride", "head_stride")


class KVRegion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """One component of one layer: a box of pages x tokens x heads, each element `head_bytes` long.

    The element of (page p, token t in the page, local head h) begins at

        base + p * page_stride + t // span * token_stride + h * head_stride

    Strides and sizes are in bytes; `pages` and `page_tokens` are counts. `head_bytes` is head size times item size.
    `head_range` is the half-open range of the model's KV heads that are here, `heads` its length. `component` is "k",
    "v", "latent" (MLA: one head that holds the whole latent), or the name of a state ("conv_k", "ssm"), whose heads
    are whatever the model's ranks divide it by. The stride of an axis of length 1 has no meaning. `device` is where
    the bytes are: "cpu", "cuda:0", "npu:1", as the engine's own process numbers them.

    `group` names the page table that the region goes by, "" for the main one, see `KVGroup`. `span` is the tokens
    that one element covers (block scales, compressed caches): `page_tokens // span` elements lie in a page. `format`,
    if given, is the fingerprint of bytes that only an equal engine can read: they are copied between equal formats
    with equal `head_range`, and with `span == page_tokens` only in whole pages.

    Raises `LayoutError`. Strides must nest: each is at least the bytes that the shorter strides step over.
    """

    layer: int
    component: str
    base: int
    pages: int
    page_stride: int
    page_tokens: int
    token_stride: int
    heads: int
    head_stride: int
    head_bytes: int
    head_range: tuple[int, int]
    device: str = "cpu"
    group: str = ""
    span: int = 1
    format: str = ""

    def __post_init__(self) -> None:
        for name in _POSITIVE + _NOT_NEGATIVE:
            value = getattr(self, name)
            least = int(name in _POSITIVE)
            if type(value) is not int or not least <= value < ADDRESS_END:
                raise LayoutError(f"{self.name}: {name} is {value!r}; give an int of at least {least}, below 2**64")
        if self.page_tokens > MAX_PAGE_TOKENS:
            raise LayoutError(f"{self.name}: page_tokens is {self.page_tokens}; at most {MAX_PAGE_TOKENS} are possible")
        if self.page_tokens % self.span:
            raise LayoutError(f"{self.name}: page_tokens is {self.page_tokens}; give a multiple of span {self.span}")
        if self.pages > MAX_PAGES:
            raise LayoutError(f"{self.name}: pages is {self.pages}; at most {MAX_PAGES} are possible")
        lo, hi = self.head_range
        if not 0 <= lo < hi or hi - lo != self.heads:
            raise LayoutError(f"{self.name}: heads is {self.heads}; head_range must be half-open and as long as that")
        if not 0 < len(self.component) <= MAX_NAME_CHARS or not 0 < len(self.device) <= MAX_NAME_CHARS:
            raise LayoutError(
                f"{self.name} on device {self.device[:MAX_NAME_CHARS]!r}: "
                f"component and device must be 1 to {MAX_NAME_CHARS} characters"
            )
        if len(self.group) > MAX_NAME_CHARS or len(self.format) > MAX_NAME_CHARS:
            raise LayoutError(
                f"{self.name}: group {self.group[:MAX_NAME_CHARS]!r} and format {self.format[:MAX_NAME_CHARS]!r} "
                f"must be at most {MAX_NAME_CHARS} characters"
            )
        self._check_nesting()
        if self.base + self.extent >= ADDRESS_END:
            raise LayoutError(f"{self.name}: ends at address {self.base + self.extent:#x}, beyond 64 bits; check base")

    def _check_nesting(self) -> None:
        covered = self.head_bytes
        for stride, count in reversed(self.axes):
            if stride < covered:
                raise LayoutError(
                    f"{self.name}: a stride of {stride} bytes steps into the {covered} bytes that lie within one step "
                    f"(page_stride {self.page_stride}, token_stride {self.token_stride}, head_stride "
                    f"{self.head_stride}, head_bytes {self.head_bytes}); strides are in bytes and must nest"
                )
            covered += (count - 1) * stride

    @property
    def name(self) -> str:
        """Which one it is, for messages."""
        lo, hi = self.head_range
        return f"layer {self.layer} {self.component[:MAX_NAME_CHARS]!r} heads [{lo}, {hi})"

    @cached_property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(stride in bytes, count) of every axis longer than 1, widest stride first."""
        every = (
            (self.page_stride, self.pages),
            (self.token_stride, self.page_tokens // self.span),
            (self.head_stride, self.heads),
        )
        return tuple(sorted(((stride, count) for stride, count in every if count > 1), reverse=True))

    @cached_property
    def extent(self) -> int:
        """Bytes from `base` to the end of the last element, gaps included."""
        return self.head_bytes + sum((count - 1) * stride for stride, count in self.axes)


class KVLayout(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """All regions of one engine rank. Raises `LayoutError`; travels between peers as msgpack.

    `dtype` names the element type and `model` whatever else must agree before bytes may be copied (a fingerprint of
    the model and its cache format); two layouts are compatible only if both strings are equal.

    One page number means the same page in every region of a group: all have the same `pages` and `page_tokens`. They
    may differ in heads, sizes, strides and device: some layers may be on the host, or on another GPU of the process.
    All are in one address space, so an address tells its device, and what is on different devices does not
    interleave. Regions of one device may interleave in one allocation; an interleaving whose strides do not fit into
    each other cannot be shown to be free of overlap here, and is refused. Regions of different groups may share memory:
    some engines deal the pages of one pool to several groups. Then a request's pages are checked when they are offered.

    `groups` declares the groups beside the main one that regions name. `split`: the rank holds only some tokens of a
    request. It divides what keeps every token: the main group and groups without a window. What has a window is whole
    on each rank that declares it; where tokens do not interleave, on the one that sends it.
    """

    regions: tuple[KVRegion, ...]
    dtype: str
    model: str = ""
    groups: tuple[KVGroup, ...] = ()
    split: TokenSplit | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.regions) <= MAX_REGIONS:
            raise LayoutError(f"a layout of {len(self.regions)} regions; give 1 to {MAX_REGIONS}")
        if not 0 < len(self.dtype) <= MAX_NAME_CHARS or len(self.model) > MAX_NAME_CHARS:
            raise LayoutError(
                f"dtype {self.dtype[:MAX_NAME_CHARS]!r}, model {self.model[:MAX_NAME_CHARS]!r}: "
                f"dtype must be given, and both at most {MAX_NAME_CHARS} characters"
            )
        names = [group.name for group in self.groups]
        if len(names) > MAX_GROUPS or len(set(names)) < len(names):
            raise LayoutError(f"{len(names)} groups {names[:8]}; give each a name of its own, {MAX_GROUPS} at most")
        for region in self.regions:
            if region.group and region.group not in names:
                raise LayoutError(
                    f"{region.name}: group {region.group!r} is not among the layout's groups {names}; "
                    f"declare it with KVGroup"
                )
        self._check_agreement()
        self._check_memory()

    def _check_agreement(self) -> None:
        """Refuse regions of a group that do not agree, or that declare heads twice."""
        leads: dict[str, KVRegion] = {}
        for region in self.regions:
            first = leads.setdefault(region.group, region)
            for field in ("page_tokens", "pages"):
                value, expected = getattr(region, field), getattr(first, field)
                if value != expected:
                    raise LayoutError(
                        f"{region.name}: {field} is {value!r}, but {expected!r} in {first.name}; "
                        f"all regions of a group must agree on it"
                    )
            split = self.tables[region.group].split
            if split is not None and split.interleave % region.span:
                raise LayoutError(
                    f"{region.name}: an element covers {region.span} tokens, but tokens interleave by "
                    f"{split.interleave}; interleave by a multiple of the span"
                )
        ordered = sorted(self.regions, key=lambda r: (r.layer, r.component, r.head_range))
        for one, other in pairwise(ordered):
            same = (one.layer, one.component) == (other.layer, other.component)
            if same and other.head_range[0] < one.head_range[1]:
                raise LayoutError(f"{one.name} and {other.name} declare the same heads; declare each head once")

    def _check_memory(self) -> None:
        """Refuse regions that take the same bytes: of two devices anywhere, of one device within a group."""
        ordered = sorted(self.regions, key=lambda r: r.base)
        widest = ordered[0]  # of those that begin earlier, the one that ends last
        for region in ordered:
            if region.device != widest.device and region.base < widest.base + widest.extent:
                raise LayoutError(
                    f"{widest.name} on {widest.device!r} and {region.name} on {region.device!r} take the same "
                    f"addresses; check their bases and devices"
                )
            widest = max(widest, region, key=lambda r: r.base + r.extent)
        for group in {region.group for region in self.regions}:
            found = clash([Box(i, r.base, r.extent, r.axes) for i, r in enumerate(self.regions) if r.group == group])
            if found is not None:
                one, other = (self.regions[i].name for i in sorted(found))
                raise LayoutError(
                    f"{one} and {other} share memory, or interleave with strides that do not fit into each other; "
                    f"check their bases, strides and page counts"
                )

    @cached_property
    def tables(self) -> dict[str, PageTable]:
        """How page lists are read, for each group: the main one ("") and those declared, with regions or without."""
        found = {}
        for group in (None, *self.groups):
            name, window = (group.name, group.window) if group else ("", 0)
            regions = [region for region in self.regions if region.group == name]
            page_tokens, pages = (regions[0].page_tokens, regions[0].pages) if regions else (0, 0)
            split = self.split if self.split and self.split.interleave and not window else None
            found[name] = PageTable(page_tokens, pages, math.lcm(*(r.span for r in regions)), window, split)
        return found

    def table(self, group: str = "") -> PageTable:
        """How page lists of this group are read. `PlanError` if the layout declares no such group."""
        found = self.tables.get(group)
        if found is None:
            raise PlanError(f"no group {group!r} in the layout, which has {sorted(self.tables)}; give one of these")
        return found

    @property
    def page_tokens(self) -> int:
        """Tokens in a page of the main group, or of the first region's group if no region is in the main one."""
        return self.tables[""].page_tokens or self.regions[0].page_tokens

    @property
    def pages(self) -> int:
        """Pages in the pool of that group; page numbers are [0, pages)."""
        return self.tables[""].pages or self.regions[0].pages

    def window_start(self, group: str, stop: int) -> int:
        """The first token that the group keeps of a request of `stop` tokens: 0 in a group without a window.

        Never inside an element that covers several tokens.
        """
        return self.table(group).window_start(stop)

    def window_nbytes(self, start: int, stop: int, group: str = "") -> int:
        """Bytes that tokens [start, stop) take, over all regions of the group; of this rank's tokens, if it is split.

        A last element that reaches beyond `stop` counts whole.
        """
        table = self.table(group)
        first, last = table.place(start), table.place(stop)
        regions = [region for region in self.regions if region.group == group]
        return sum((-(-last // r.span) - first // r.span) * r.heads * r.head_bytes for r in regions)

    def window_pages(self, start: int, stop: int, group: str = "") -> int:
        """How many pages hold tokens [start, stop) of a request; page borders lie at multiples of `page_tokens`.

        Where tokens interleave, only this rank's count, and pages are counted in its own, packed tokens.
        """
        return self.table(group).window_pages(start, stop)

    def memory(self) -> tuple[MemoryRange, ...]:
        """The memory to register with a transport: sorted by address and disjoint.

        Regions of one device that touch or interleave are joined; those of different devices never are.
        """
        joined: list[MemoryRange] = []
        for begin, end, device in sorted((r.base, r.base + r.extent, r.device) for r in self.regions):
            last = joined[-1] if joined else None
            if last is not None and last.device == device and begin <= last.address + last.nbytes:
                joined[-1] = last._replace(nbytes=max(end - last.address, last.nbytes))
            else:
                joined.append(MemoryRange(begin, end - begin, device))
        return tuple(joined)


def array_regions(
    base: int,
    shape: Sequence[int],
    strides: Sequence[int],
    axes: str,
    *,
    itemsize: int,
    layers: Sequence[int] = (0,),
    components: Sequence[str] = ("k", "v"),
    first_head: int = 0,
    device: str = "cpu",
    group: str = "",
    span: int = 1,
    format: str = "",
) -> tuple[KVRegion, ...]:
    """Regions of an array-like pool: one for each layer and component.

    `base` is the address of its first element (`array.ctypes.data`, `tensor.data_ptr()`), `strides` are in bytes
    (`array.strides`; for torch `[s * t.element_size() for s in t.stride()]`). `axes` has one letter per axis:

        L layer    C component    P page    T token in page    H head    D lane in head

    P and D must be there. Without L the array holds one layer, without C one component, without H one head (MLA),
    without T one element a page (a state, or an opaque page). Lanes must be contiguous. `layers` and `components` say
    which ones the array holds, in its order; its heads are [first_head, first_head + H) of the model. `span`: axis T
    counts elements of so many tokens. `group` and `format` are those of `KVRegion`. Raises `LayoutError`.

        regions = array_regions(a.ctypes.data, a.shape, a.strides, "LCPTHD", itemsize=4, layers=range(30))
        layout = KVLayout(regions, dtype="float32")
    """
    if not len(axes) == len(set(axes)) == len(shape) == len(strides) or not set("PD") <= set(axes) <= set("LCPTHD"):
        raise LayoutError(
            f"axes {axes!r} for shape {tuple(shape)} and strides {tuple(strides)}; "
            f"give one letter of LCPTHD for each axis, each letter once, P and D at least"
        )
    count = dict.fromkeys("LCTH", 1) | dict(zip(axes, (int(n) for n in shape), strict=True))
    stride = dict.fromkeys("LCTH", 0) | dict(zip(axes, (int(n) for n in strides), strict=True))
    if count["L"] != len(layers) or count["C"] != len(components):
        raise LayoutError(
            f"the array holds {count['L']} layers and {count['C']} components (axes {axes!r}, shape {tuple(shape)}), "
            f"but {len(layers)} layers and {len(components)} components {tuple(components)} are named"
        )
    if stride["D"] != itemsize:
        raise LayoutError(f"lanes are {stride['D']} bytes apart, itemsize is {itemsize}; lanes must be contiguous")
    return tuple(
        KVRegion(
            layer=layer,
            component=component,
            base=base + i * stride["L"] + j * stride["C"],
            pages=count["P"],
            page_stride=stride["P"],
            page_tokens=count["T"] * span,
            token_stride=stride["T"],
            heads=count["H"],
            head_stride=stride["H"],
            head_bytes=count["D"] * itemsize,
            head_range=(first_head, first_head + count["H"]),
            device=device,
            group=group,
            span=span,
            format=format,
        )
        for i, layer in enumerate(layers)
        for j, component in enumerate(components)
    )

"""The memory layout of a rank's KV pool.

The law: every layout that was constructed is valid. Sizes are positive, addresses fit in 64 bits, and no two elements
of one group share a byte; otherwise the constructor raises `LayoutError`. Decoding a peer's layout constructs it, and
so checks it in the same way.

A layout consists of bases and strides in bytes. Token-major or head-major, K and V fused or apart, one tensor per layer
or one for all: only the numbers differ, not the code. Layers of a draft model are further layers, with numbers or
component names that the model's own layers do not use.
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

    Strides must nest: each stride is at least as long as the bytes that all shorter axes cover together. The stride of
    an axis of length 1 has no meaning.

    Raises:
        LayoutError: a number is out of range, or the strides do not nest. Nothing was constructed.
    """

    layer: int
    """Number of the layer in the model, from 0."""
    component: str
    """"k", "v", "latent" (MLA: one head that holds the whole latent), or the name of a state ("conv_k", "ssm"), whose
    heads are the units by which the model's ranks divide it."""
    base: int
    """Virtual address of the first element."""
    pages: int
    """Pages in the pool."""
    page_stride: int
    """Bytes from one page to the next."""
    page_tokens: int
    """Tokens in a page, a multiple of `span`."""
    token_stride: int
    """Bytes from one element to the next along the tokens of a page."""
    heads: int
    """Heads in this region: the length of `head_range`."""
    head_stride: int
    """Bytes from one head to the next."""
    head_bytes: int
    """Bytes of one element: head size times item size."""
    head_range: tuple[int, int]
    """Half-open range of the model's KV heads in this region."""
    device: str = "cpu"
    """Device of the memory, with the engine process's own number: "cpu", "cuda:0", "npu:1"."""
    group: str = ""
    """Name of the page table that applies to this region, "" for the main one; see `KVGroup`."""
    span: int = 1
    """Tokens that one element covers (block scales, compressed caches): a page has `page_tokens // span` elements."""
    format: str = ""
    """Fingerprint of bytes that only an equal engine can read, "" for plain arrays. Such bytes are copied only between
    equal formats with equal `head_range`, and with `span == page_tokens` only in whole pages."""

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
            raise LayoutError(
                f"{self.name}: heads is {self.heads}, head_range [{lo}, {hi}); give a half-open range of that length"
            )
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
        """Return a name of this region for error messages."""
        lo, hi = self.head_range
        return f"layer {self.layer} {self.component[:MAX_NAME_CHARS]!r} heads [{lo}, {hi})"

    @cached_property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """Return (stride in bytes, count) of every axis longer than 1, widest stride first."""
        every = (
            (self.page_stride, self.pages),
            (self.token_stride, self.page_tokens // self.span),
            (self.head_stride, self.heads),
        )
        return tuple(sorted(((stride, count) for stride, count in every if count > 1), reverse=True))

    @cached_property
    def extent(self) -> int:
        """Return the bytes from `base` to the end of the last element, gaps included."""
        return self.head_bytes + sum((count - 1) * stride for stride, count in self.axes)


class KVLayout(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """All regions of one engine rank. It travels between peers as msgpack.

    A page number means the same page in every region of a group, so all of them have the same `pages` and
    `page_tokens`. They may differ in heads, sizes, strides and device: some layers may be on the host, or on another
    GPU of the process. All regions are in one address space, so an address determines its device, and regions of
    different devices do not interleave. Regions of one device may interleave in one allocation. An interleaving that
    cannot be shown to be free of overlap is refused. Regions of different groups may share memory, because some engines
    deal the pages of one pool to several groups. A request's pages are then checked when they are offered.

    Raises:
        LayoutError: a field is out of range, regions of a group disagree, or two regions share bytes or heads.
            Nothing was constructed.
    """

    regions: tuple[KVRegion, ...]
    """The regions, 1 to 4096, in any order."""
    dtype: str
    """Name of the element type; two layouts are compatible only if it is equal."""
    model: str = ""
    """Fingerprint of everything else that must agree before bytes may be copied (the model and its cache format);
    two layouts are compatible only if it is equal."""
    groups: tuple[KVGroup, ...] = ()
    """The groups that regions name, without the main one."""
    split: TokenSplit | None = None
    """The tokens of a request that this rank holds, None for all. It applies to the main group and to groups without a
    window. A group with a window is whole on each rank that declares it; where tokens do not interleave, on the rank
    that sends it."""

    def __post_init__(self) -> None:
        if not 0 < len(self.regions) <= MAX_REGIONS:
            raise LayoutError(f"the layout has {len(self.regions)} regions; give 1 to {MAX_REGIONS}")
        if not 0 < len(self.dtype) <= MAX_NAME_CHARS or len(self.model) > MAX_NAME_CHARS:
            raise LayoutError(
                f"dtype {self.dtype[:MAX_NAME_CHARS]!r}, model {self.model[:MAX_NAME_CHARS]!r}: "
                f"dtype must be given, and both at most {MAX_NAME_CHARS} characters"
            )
        names = [group.name for group in self.groups]
        if len(names) > MAX_GROUPS or len(set(names)) < len(names):
            raise LayoutError(f"{len(names)} groups {names[:8]}; give unique names, and {MAX_GROUPS} groups at most")
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
        """Refuse regions that share bytes: regions of two devices in any case, of one device within a group."""
        ordered = sorted(self.regions, key=lambda r: r.base)
        widest = ordered[0]  # among the regions that begin earlier: the one that ends last
        for region in ordered:
            if region.device != widest.device and region.base < widest.base + widest.extent:
                raise LayoutError(
                    f"{widest.name} on {widest.device!r} and {region.name} on {region.device!r} have the same "
                    f"addresses; check their bases and devices"
                )
            widest = max(widest, region, key=lambda r: r.base + r.extent)
        for group in {region.group for region in self.regions}:
            found = clash([Box(i, r.base, r.extent, r.axes) for i, r in enumerate(self.regions) if r.group == group])
            if found is not None:
                one, other = (self.regions[i].name for i in sorted(found))
                raise LayoutError(
                    f"{one} and {other} share memory, or interleave and cannot be shown to be free of overlap; "
                    f"check their bases, strides and page counts"
                )

    @cached_property
    def tables(self) -> dict[str, PageTable]:
        """Return the page tables by name of group: the main one ("") and all declared ones, even without regions."""
        found = {}
        for group in (None, *self.groups):
            name, window = (group.name, group.window) if group else ("", 0)
            regions = [region for region in self.regions if region.group == name]
            page_tokens, pages = (regions[0].page_tokens, regions[0].pages) if regions else (0, 0)
            split = self.split if self.split and self.split.interleave and not window else None
            found[name] = PageTable(page_tokens, pages, math.lcm(*(r.span for r in regions)), window, split)
        return found

    def table(self, group: str = "") -> PageTable:
        """Return the page table of this group. Raises `PlanError` if the layout does not declare it."""
        found = self.tables.get(group)
        if found is None:
            raise PlanError(f"no group {group!r} in the layout, which has {sorted(self.tables)}; give one of these")
        return found

    @property
    def page_tokens(self) -> int:
        """Return the tokens in a page of the main group, or of the first region's group if the main one is empty."""
        return self.tables[""].page_tokens or self.regions[0].page_tokens

    @property
    def pages(self) -> int:
        """Return the pages in the pool of that same group; page numbers are [0, pages)."""
        return self.tables[""].pages or self.regions[0].pages

    def window_start(self, group: str, stop: int) -> int:
        """Return the first token that the group keeps of a request of `stop` tokens: 0 in a group without a window.

        The result is a multiple of the span, so it never lies inside an element that covers several tokens.
        """
        return self.table(group).window_start(stop)

    def window_nbytes(self, start: int, stop: int, group: str = "") -> int:
        """Return the bytes that tokens [start, stop) take in all regions of the group; if split, of this rank's tokens.

        A last element that reaches beyond `stop` counts in full.
        """
        table = self.table(group)
        first, last = table.place(start), table.place(stop)
        regions = [region for region in self.regions if region.group == group]
        return sum((-(-last // r.span) - first // r.span) * r.heads * r.head_bytes for r in regions)

    def window_pages(self, start: int, stop: int, group: str = "") -> int:
        """Return the number of pages that hold tokens [start, stop) of a request.

        Page borders lie at multiples of `page_tokens`. Where tokens interleave, only this rank's tokens count, and
        pages are counted in its own, packed tokens.
        """
        return self.table(group).window_pages(start, stop)

    def memory(self) -> tuple[MemoryRange, ...]:
        """Return the memory to register with a transport, sorted by address and disjoint.

        Regions of one device that touch or interleave are joined; regions of different devices are not.
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
    """Return the regions of an array-like pool: one for each layer and component.

    `axes` has one letter for each axis of the array:

        L layer    C component    P page    T token in page    H head    D lane in head

    P and D are required. Without L the array holds one layer, without C one component, without H one head (MLA),
    without T one element per page (a state, or an opaque page). Lanes must be contiguous. An example:

        regions = array_regions(a.ctypes.data, a.shape, a.strides, "LCPTHD", itemsize=4, layers=range(30))
        layout = KVLayout(regions, dtype="float32")

    Args:
        base: address of the first element (`array.ctypes.data`, `tensor.data_ptr()`).
        shape: length of each axis.
        strides: stride of each axis in bytes (`array.strides`; for torch `[s * t.element_size() for s in t.stride()]`).
        axes: one letter for each axis, as above.
        itemsize: bytes of one lane.
        layers: numbers of the layers, in the order of axis L.
        components: names of the components, in the order of axis C.
        first_head: the array has the heads [first_head, first_head + H) of the model.
        device: device of the memory, as in `KVRegion`.
        group: name of the page table, as in `KVRegion`.
        span: tokens that one element along axis T covers.
        format: as in `KVRegion`.

    Raises:
        LayoutError: the axes do not describe the array, or a region is invalid.
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

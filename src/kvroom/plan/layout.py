"""What a rank's KV pool looks like in memory.

The law: a layout that exists is sound. Sizes are positive, addresses fit in 64 bits, and no two elements share a byte;
`LayoutError` at construction otherwise. Decoding a layout that a peer sent constructs it, so it is checked alike.

Everything is bases and strides in bytes. Token-major or head-major, K and V fused or apart, one tensor per layer or
one for all: the numbers differ, the code does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from kvroom.errors import LayoutError
from kvroom.plan.blocks import MemoryRange

ADDRESS_LIMIT = 2**64
PAGES_LIMIT = 2**32
PAGE_TOKENS_LIMIT = 2**20
REGIONS_LIMIT = 4096
NAME_LIMIT = 256
# Axes of different strides that may interleave in one place: page, token and head of two different arrangements.
FOLDS_LIMIT = 6

_POSITIVE = ("pages", "page_tokens", "heads", "head_bytes")
_NOT_NEGATIVE = ("layer", "base", "page_stride", "token_stride", "head_stride")


class KVRegion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One component of one layer: a box of pages x tokens x heads, each element `head_bytes` long.

    The element of (page p, token t in the page, local head h) begins at

        base + p * page_stride + t * token_stride + h * head_stride

    Strides and sizes are in bytes; `pages` and `page_tokens` are counts. `head_bytes` is head size times item size.
    `head_range` is the half-open range of the model's KV heads that are here, `heads` its length. `component` is "k",
    "v" or "latent" (MLA: one head that holds the whole latent). The stride of an axis of length 1 has no meaning.
    `device` is where the bytes are: "cpu", "cuda:0", "npu:1", as the engine's own process numbers them.

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

    def __post_init__(self) -> None:
        self._check_numbers()
        lo, hi = self.head_range
        if not 0 <= lo < hi or hi - lo != self.heads:
            raise LayoutError(f"{self.name}: heads is {self.heads}; head_range must be half-open and as long as that")
        if not 0 < len(self.component) <= NAME_LIMIT or not 0 < len(self.device) <= NAME_LIMIT:
            raise LayoutError(
                f"{self.name} on device {self.device[:NAME_LIMIT]!r}: "
                f"component and device must be 1 to {NAME_LIMIT} characters"
            )
        self._check_nesting()
        if self.base + self.extent >= ADDRESS_LIMIT:
            raise LayoutError(f"{self.name}: ends at address {self.base + self.extent:#x}, beyond 64 bits; check base")

    def _check_numbers(self) -> None:
        for name in _POSITIVE + _NOT_NEGATIVE:
            value = getattr(self, name)
            least = int(name in _POSITIVE)
            if type(value) is not int or not least <= value < ADDRESS_LIMIT:
                raise LayoutError(f"{self.name}: {name} is {value!r}; give an int of at least {least}, below 2**64")
        if self.page_tokens > PAGE_TOKENS_LIMIT:
            raise LayoutError(
                f"{self.name}: page_tokens is {self.page_tokens}; at most {PAGE_TOKENS_LIMIT} are possible"
            )
        if self.pages > PAGES_LIMIT:
            raise LayoutError(f"{self.name}: pages is {self.pages}; at most {PAGES_LIMIT} are possible")

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
        return f"layer {self.layer} {self.component[:NAME_LIMIT]!r} heads [{lo}, {hi})"

    @property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(stride in bytes, count) of every axis longer than 1, widest stride first."""
        every = (
            (self.page_stride, self.pages),
            (self.token_stride, self.page_tokens),
            (self.head_stride, self.heads),
        )
        return tuple(sorted(((stride, count) for stride, count in every if count > 1), reverse=True))

    @property
    def extent(self) -> int:
        """Bytes from `base` to the end of the last element, gaps included."""
        return self.head_bytes + sum((count - 1) * stride for stride, count in self.axes)


class KVLayout(msgspec.Struct, frozen=True, omit_defaults=True):
    """All regions of one engine rank. Raises `LayoutError`; travels between peers as msgpack.

    `dtype` names the element type and `model` whatever else must agree before bytes may be copied (a fingerprint of
    the model and its cache format); two layouts are compatible only if both strings are equal.

    One page number means the same page in every region: all regions have the same `pages` and `page_tokens`. They may
    differ in heads, sizes, strides and device: some layers may be on the host, or on another GPU of the process. All
    are in one address space, so an address tells its device, and what is on different devices does not interleave.
    Regions of one device may interleave in one allocation; an interleaving whose strides do not fit into each other
    cannot be shown to be free of overlap here, and is refused.
    """

    regions: tuple[KVRegion, ...]
    dtype: str
    model: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.regions) <= REGIONS_LIMIT:
            raise LayoutError(f"a layout of {len(self.regions)} regions; give 1 to {REGIONS_LIMIT}")
        if not 0 < len(self.dtype) <= NAME_LIMIT or len(self.model) > NAME_LIMIT:
            raise LayoutError(
                f"dtype {self.dtype[:NAME_LIMIT]!r}, model {self.model[:NAME_LIMIT]!r}: "
                f"dtype must be given, and both at most {NAME_LIMIT} characters"
            )
        self._check_agreement()
        self._check_heads()
        self._check_devices()
        clash = _clash([_Box(i, r.base, r.extent, r.axes) for i, r in enumerate(self.regions)])
        if clash is not None:
            one, other = (self.regions[i].name for i in sorted(clash))
            raise LayoutError(
                f"{one} and {other} share memory, or interleave with strides that do not fit into each other; "
                f"check their bases, strides and page counts"
            )

    def _check_agreement(self) -> None:
        first = self.regions[0]
        for region in self.regions:
            for field in ("page_tokens", "pages"):
                value, expected = getattr(region, field), getattr(first, field)
                if value != expected:
                    raise LayoutError(
                        f"{region.name}: {field} is {value!r}, but {expected!r} in {first.name}; "
                        f"all regions of a layout must agree on it"
                    )

    def _check_heads(self) -> None:
        ordered = sorted(self.regions, key=lambda r: (r.layer, r.component, r.head_range))
        for one, other in pairwise(ordered):
            same = (one.layer, one.component) == (other.layer, other.component)
            if same and other.head_range[0] < one.head_range[1]:
                raise LayoutError(f"{one.name} and {other.name} declare the same heads; declare each head once")

    def _check_devices(self) -> None:
        ordered = sorted(self.regions, key=lambda r: r.base)
        widest = ordered[0]  # of those that begin earlier, the one that ends last
        for region in ordered:
            if region.device != widest.device and region.base < widest.base + widest.extent:
                raise LayoutError(
                    f"{widest.name} on {widest.device!r} and {region.name} on {region.device!r} take the same "
                    f"addresses; check their bases and devices"
                )
            widest = max(widest, region, key=lambda r: r.base + r.extent)

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""
        return self.regions[0].page_tokens

    @property
    def pages(self) -> int:
        """Pages in the pool; page numbers are [0, pages)."""
        return self.regions[0].pages

    @property
    def token_nbytes(self) -> int:
        """Bytes that one token takes, over all regions."""
        return sum(region.heads * region.head_bytes for region in self.regions)

    def window_nbytes(self, start: int, stop: int) -> int:
        """Bytes that tokens [start, stop) take, over all regions."""
        return (stop - start) * self.token_nbytes

    def window_pages(self, start: int, stop: int) -> int:
        """How many pages hold tokens [start, stop) of a request; page borders lie at multiples of `page_tokens`."""
        return -(-stop // self.page_tokens) - start // self.page_tokens if stop > start else 0

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
) -> tuple[KVRegion, ...]:
    """Regions of an array-like pool: one for each layer and component.

    `base` is the address of its first element (`array.ctypes.data`, `tensor.data_ptr()`), `strides` are in bytes
    (`array.strides`; for torch `[s * t.element_size() for s in t.stride()]`). `axes` has one letter per axis:

        L layer    C component    P page    T token in page    H head    D lane in head

    P, T and D must be there. Without L the array holds one layer, without C one component, without H one head (MLA).
    Lanes must be contiguous. `layers` and `components` say which ones the array holds, in its order; its heads are
    [first_head, first_head + H) of the model. Raises `LayoutError`.

        regions = array_regions(a.ctypes.data, a.shape, a.strides, "LCPTHD", itemsize=4, layers=range(30))
        layout = KVLayout(regions, dtype="float32")
    """
    if not len(axes) == len(set(axes)) == len(shape) == len(strides) or not set("PTD") <= set(axes) <= set("LCPTHD"):
        raise LayoutError(
            f"axes {axes!r} for shape {tuple(shape)} and strides {tuple(strides)}; "
            f"give one letter of LCPTHD for each axis, each letter once, P, T and D at least"
        )
    count = dict.fromkeys("LCH", 1) | dict(zip(axes, (int(n) for n in shape), strict=True))
    stride = dict.fromkeys("LCH", 0) | dict(zip(axes, (int(n) for n in strides), strict=True))
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
            page_tokens=count["T"],
            token_stride=stride["T"],
            heads=count["H"],
            head_stride=stride["H"],
            head_bytes=count["D"] * itemsize,
            head_range=(first_head, first_head + count["H"]),
            device=device,
        )
        for i, layer in enumerate(layers)
        for j, component in enumerate(components)
    )


class _Box(NamedTuple):
    """Elements of region number `owner`: `extent` bytes from `base` on, gaps included; `axes` as those of a region."""

    owner: int
    base: int
    extent: int
    axes: tuple[tuple[int, int], ...]


def _crowds(boxes: Iterable[_Box]) -> Iterator[list[_Box]]:
    """Groups of two or more boxes, of different regions, that are chained together by overlapping spans."""
    crowd: list[_Box] = []
    end = 0
    for box in [*sorted(set(boxes), key=lambda b: (b.base, b.owner)), None]:
        if box is not None and box.base < end:
            crowd.append(box)
            end = max(end, box.base + box.extent)
            continue
        if len({member.owner for member in crowd}) > 1:
            yield crowd
        if box is not None:
            crowd, end = [box], box.base + box.extent


def _clash(boxes: Iterable[_Box], folds_left: int = FOLDS_LIMIT) -> tuple[int, int] | None:
    """Two regions that share a byte or cannot be shown not to; None is a proof that all are disjoint.

    Boxes whose spans overlap can still interleave. Fold them onto a circle as long as the widest stride among them:
    if they are disjoint there, they are disjoint for any number of steps. Repeat with what still overlaps.
    Sorting and a limit on folds keep this cheap for thousands of regions, whatever strides a peer may think of.
    """
    for crowd in _crowds(boxes):
        step = max(box.axes[0][0] if box.axes else 0 for box in crowd)
        folded: list[_Box] = []
        for box in crowd:
            inner = _without(box, step)
            if step == 0 or inner.extent > step or folds_left == 0:
                return box.owner, next(other.owner for other in crowd if other.owner != box.owner)
            at = (box.base - crowd[0].base) % step
            folded.append(inner._replace(base=at))
            if at + inner.extent > step:
                folded.append(inner._replace(base=at - step))
        clash = _clash(folded, folds_left - 1)
        if clash is not None:
            return clash
    return None


def _without(box: _Box, step: int) -> _Box:
    """The box without its outer axis, if that axis steps by `step`."""
    if not box.axes or box.axes[0][0] != step:
        return box
    (stride, count), *inner = box.axes
    return _Box(box.owner, box.base, box.extent - (count - 1) * stride, tuple(inner))

"""The options of every transport around an engine: trust in the network, and packing of small blocks."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from kvroom.errors import ConfigurationError
from kvroom.transports.kit.options import ListeningOptions

OneSidedOptionsT = TypeVar("OneSidedOptionsT", bound="OneSidedOptions")
SLOTS = 8  # staging slots to gather in, and the same number for peers to write into
_PAGE_BYTES = 4096
_LEAST_BYTES = 2 * SLOTS * _PAGE_BYTES


class OneSidedOptions(ListeningOptions, frozen=True, kw_only=True):
    """`host` and `advertise` apply to the pack server as well, which leases staging slots to peers."""

    packing: Annotated[
        Literal["auto", "always", "never"],
        Meta(description="whether to pack small blocks; auto packs where that is faster"),
    ] = "auto"
    staging_bytes: Annotated[int, Meta(ge=0, description="total memory for packed blocks; 0 turns packing off")] = (
        64 << 20
    )
    trusted_fabric: Annotated[
        bool, Meta(description="trust every process that reaches the engine's ports or fabric with the KV pool")
    ] = False

    @property
    def packs(self) -> bool:
        """True if there is staging memory, so that blocks may be packed."""
        return self.packing != "never" and self.staging_bytes > 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, a multiple of the page size of 4 KiB."""
        return self.staging_bytes // (2 * SLOTS) // _PAGE_BYTES * _PAGE_BYTES

    def checked(self: OneSidedOptionsT, name: str) -> OneSidedOptionsT:
        """Check as in `TransportOptions`; also refuse staging memory that is too small for its slots."""
        read = super().checked(name)
        if read.packs and not read.slot_bytes:
            raise ConfigurationError(
                f"transport {name}: staging_bytes={read.staging_bytes}: choose 0, or at least {_LEAST_BYTES}"
            )
        return read

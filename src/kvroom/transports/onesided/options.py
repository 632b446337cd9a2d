"""The options that all transports around an engine have: trust in who reaches it, and how small blocks are packed."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from kvroom.errors import ConfigurationError
from kvroom.transports.kit.options import ListeningOptions

OneSidedOptionsT = TypeVar("OneSidedOptionsT", bound="OneSidedOptions")
SLOTS = 8  # on each side: in which we gather, and in which peers write
_PAGE_BYTES = 4096
_LEAST_BYTES = 2 * SLOTS * _PAGE_BYTES


class OneSidedOptions(ListeningOptions, frozen=True, kw_only=True):
    """`host` and `advertise` are also those of the server that leases slots to peers which pack."""

    packing: Annotated[
        Literal["auto", "always", "never"], Meta(description="if small blocks are packed; auto does it where it pays")
    ] = "auto"
    staging_bytes: Annotated[int, Meta(ge=0, description="memory for packed blocks, in all; 0 turns packing off")] = (
        64 << 20
    )
    trusted_fabric: Annotated[
        bool, Meta(description="trust every process that reaches the engine's ports or fabric with the KV pool")
    ] = False

    @property
    def packs(self) -> bool:
        """Whether there is a staging area at all."""
        return self.packing != "never" and self.staging_bytes > 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, whole pages."""
        return self.staging_bytes // (2 * SLOTS) // _PAGE_BYTES * _PAGE_BYTES

    def checked(self: OneSidedOptionsT, name: str) -> OneSidedOptionsT:
        """As in `TransportOptions`; a staging area must have room for its slots."""
        read = super().checked(name)
        if read.packs and not read.slot_bytes:
            raise ConfigurationError(
                f"transport {name}: staging_bytes={read.staging_bytes}: take 0, or {_LEAST_BYTES} and more"
            )
        return read

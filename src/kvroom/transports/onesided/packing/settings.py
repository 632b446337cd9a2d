"""What a user can say about packing."""

from __future__ import annotations

from typing import NamedTuple

from kvroom.errors import ConfigurationError

STAGING_BYTES = 64 << 20
SLOTS = 8  # on each side: in which we gather, and in which peers write
_PAGE_BYTES = 4096
_MODES = ("auto", "always", "never")


class Packing(NamedTuple):
    """`mode`: "auto" packs where it pays, "always" and "never" say so. `staging_bytes`: in all; 0 is "never".

    `host`, `advertise`: where the pack server listens, and the address that peers dial if it is another.
    """

    mode: str = "auto"
    staging_bytes: int = STAGING_BYTES
    host: str = "127.0.0.1"
    advertise: str | None = None

    @property
    def on(self) -> bool:
        """Whether there is a staging area at all."""
        return self.mode != "never" and self.staging_bytes > 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, whole pages."""
        return self.staging_bytes // (2 * SLOTS) // _PAGE_BYTES * _PAGE_BYTES

    def check(self, name: str) -> None:
        """Raise `ConfigurationError` for what cannot be."""
        if self.mode not in _MODES:
            raise ConfigurationError(f"{name}: packing={self.mode!r}: choose one of {', '.join(_MODES)}")
        if self.on and not self.slot_bytes:
            least = 2 * SLOTS * _PAGE_BYTES
            raise ConfigurationError(f"{name}: staging_bytes={self.staging_bytes}: take 0, or {least} and more")

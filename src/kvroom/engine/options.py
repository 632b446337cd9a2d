"""The sizes and limits of an engine. Every queue and every wait in an engine has its limit here."""

from __future__ import annotations

import msgspec

from kvroom.errors import ConfigurationError


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and limits of one engine. A number that is not positive raises `ConfigurationError`."""

    pool_pages: int = 1024
    """Pages of the main page table."""
    page_tokens: int = 16
    """Tokens of a page."""
    chunk_tokens: int = 512
    """Prefill: tokens in one forward call, of one prompt or several. Finished chunks are sent during the next call."""
    max_running: int = 64
    """Requests that may hold pages at the same time."""
    max_waiting: int = 256
    """Requests beyond `max_running` that may wait for pages. One more is refused with `LimitExceeded`."""
    queue_s: float = 60.0
    """Seconds that a request may wait for pages before it fails with `LimitExceeded`."""
    refusal_s: float = 30.0
    """Prefill: seconds that a failed room is kept, so that a decode worker that comes later still gets the cause."""
    close_s: float = 2.0
    """Seconds that a closing engine waits for its rooms to drain."""
    prefix_cache: bool = True
    """Keep the contents of full pages until their memory is needed, so that prompts with the same beginning share them.
    """

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name != "prefix_cache" and not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} = {getattr(self, name)!r}: give a number above 0")

"""How large an engine may grow. Every queue and every wait in it has its limit here."""

from __future__ import annotations

import msgspec

from kvroom.errors import ConfigurationError


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and limits of one engine. Raises `ConfigurationError` for one that is not positive."""

    pool_pages: int = 1024
    page_tokens: int = 16
    chunk_tokens: int = 512
    """Prefill: tokens computed in one forward call, of one prompt or several. What is finished is sent meanwhile."""
    max_running: int = 64
    """Requests that hold pages at once."""
    max_waiting: int = 256
    """Requests beyond these that may wait for pages; one more is refused with `LimitExceeded`."""
    queue_s: float = 60.0
    """How long a request may wait for pages."""
    refusal_s: float = 30.0
    """Prefill: how long a refused room is kept so that a decode worker that comes later is told the cause."""
    close_s: float = 2.0
    """How long a closing engine waits for its rooms' peers to fall quiet."""
    prefix_cache: bool = True
    """Keep what full pages hold until their memory is needed: prompts that begin alike share them."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name != "prefix_cache" and not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} = {getattr(self, name)!r}: give a number above 0")

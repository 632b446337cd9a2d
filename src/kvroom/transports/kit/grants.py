"""The grants of a transport whose sink does the writing: which bytes may be written, and by which peers.

A grant is bound to the peers that it is offered to. It is of no use to any other peer, however that one came to know
the token.
"""

from __future__ import annotations

import logging
from functools import cached_property

from kvroom.errors import GrantRevoked, TransportError
from kvroom.listening.repeats import Repeats
from kvroom.plan.blocks import U64, Extents
from kvroom.wire.auth import TokenSource

from .ranges import Ranges

TOKEN_BYTES = 16
logger = logging.getLogger(__name__)


class ForeignGrant(TransportError):
    """A peer wants to write under a grant that was offered to others and not to it. Nothing was written."""


class _Granted:
    """The ranges are made searchable when the first blocks come, which with `auto` seldom happens."""

    def __init__(self, extents: Extents) -> None:
        self.writers: set[bytes] = set()
        self._extents = extents

    @cached_property
    def ranges(self) -> Ranges:
        """The extents."""
        return Ranges(*self._extents)


class Grants:
    """Every grant of one transport that stands, by its token. Peers are named by their endpoints.

    Safe to use from any thread.
    """

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._log = Repeats(logger)
        self._tokens = TokenSource(TOKEN_BYTES)
        self._standing: dict[bytes, _Granted] = {}

    def __contains__(self, token: bytes) -> bool:
        return token in self._standing

    def give(self, extents: Extents) -> bytes:
        """Return the token of a new grant for these extents, which no peer may use yet."""
        token = self._tokens.next()
        self._standing[token] = _Granted(extents)
        return token

    def bind(self, token: bytes, writer: bytes) -> None:
        """Let this peer use the grant, and those before it. Nothing happens to a grant that does not stand any more."""
        granted = self._standing.get(token)
        if granted is not None:
            granted.writers.add(writer)

    def take_back(self, token: bytes) -> bool:
        """End a grant; return False if it did not stand any more."""
        return self._standing.pop(token, None) is not None

    def take_back_all(self) -> None:
        """End all of them."""
        self._standing.clear()

    def check(self, writer: bytes, token: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless this peer may write these blocks under this grant now."""
        granted = self._standing.get(token)
        if granted is None:
            raise GrantRevoked("no such grant: it was revoked or never given")
        if writer not in granted.writers:
            raise ForeignGrant("the grant was not offered to this writer")
        granted.ranges.check("destination", dst, length, "was granted")

    def warn_of(self, host: str, error: ForeignGrant) -> None:
        """Tell the operator of the sink, too: no peer does this by mistake. `host`: the one it connects from."""
        text = "%s: a write of the peer at %s was refused: %s; look at who that is"
        self._log.warning(text, self._transport, host, error, extra={"peer": host})

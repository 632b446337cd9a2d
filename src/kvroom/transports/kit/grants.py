"""The grants of a transport whose sink does the writing: the bytes that may be written, and the peers that may do so.

A grant is bound to the peers that it is offered to, so another peer that learns the token cannot use it.
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
    """A peer tried to write under a grant that was offered to others and not to it. Nothing was written."""


class _Granted:
    """One grant.

    Its ranges are built when the first blocks arrive. Under `auto` that seldom happens, because only one of the
    candidates' grants is used.
    """

    def __init__(self, extents: Extents) -> None:
        self.writers: set[bytes] = set()
        self._extents = extents

    @cached_property
    def ranges(self) -> Ranges:
        """The extents, in the form against which blocks are checked."""
        return Ranges(*self._extents)


class Grants:
    """The open grants of one transport, by token. Peers are identified by their endpoints.

    May be used from any thread.
    """

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._log = Repeats(logger)
        self._tokens = TokenSource(TOKEN_BYTES)
        self._open: dict[bytes, _Granted] = {}

    def __contains__(self, token: bytes) -> bool:
        return token in self._open

    def issue(self, extents: Extents) -> bytes:
        """Create a grant for these extents, bound to no peer yet, and return its token."""
        token = self._tokens.next()
        self._open[token] = _Granted(extents)
        return token

    def bind(self, token: bytes, writer: bytes) -> None:
        """Allow one more peer to use the grant. Nothing happens if the grant has been revoked."""
        granted = self._open.get(token)
        if granted is not None:
            granted.writers.add(writer)

    def revoke(self, token: bytes) -> bool:
        """Revoke a grant. Return False if it was already revoked or never issued."""
        return self._open.pop(token, None) is not None

    def revoke_all(self) -> None:
        """Revoke all grants."""
        self._open.clear()

    def check(self, writer: bytes, token: bytes, dst: U64, length: U64) -> None:
        """Raise `TransportError` unless this peer may write these blocks under this grant now."""
        granted = self._open.get(token)
        if granted is None:
            raise GrantRevoked("no such grant: it was revoked or never issued")
        if writer not in granted.writers:
            raise ForeignGrant("the grant was not offered to this writer")
        granted.ranges.check("destination", dst, length, "was granted")

    def log_foreign(self, host: str, error: ForeignGrant) -> None:
        """Log a warning for the sink's operator, because a correct peer never does this. `host` is its address."""
        text = "%s: refused a write by the peer at %s: %s; find out which process that is"
        self._log.warning(text, self._transport, host, error, extra={"peer": host})

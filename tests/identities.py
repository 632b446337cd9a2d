"""The identity that tests of everything but identities give to the two sides of a room."""

from __future__ import annotations

from kvroom.core.identity import KVIdentity

PROMPT = KVIdentity.of(range(20), adapter="", cache_salt="")

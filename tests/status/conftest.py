"""A pair of managers, and a status server on each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvroom.status.server import StatusServer

from .status_helpers import Pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


@pytest.fixture
def source(pair: Pair) -> Iterator[str]:
    """Yield the address of the prefill manager's status server."""
    with StatusServer(pair.prefill, extra=lambda: {"engine": "ours"}) as server:
        yield server.address


@pytest.fixture
def sink(pair: Pair) -> Iterator[str]:
    """Yield the address of the decode manager's status server."""
    with StatusServer(pair.decode) as server:
        yield server.address

"""For any bytes, a pure decoder returns a value or raises a declared error. `make fuzz` tests for longer."""

from __future__ import annotations

from random import Random

import pytest

from kvroom.bootstrap.directory import NotReady
from kvroom.errors import KVRoomError

from .mutations import ODD, mutate
from .targets import TARGETS

INPUTS = 3000


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_seed_is_a_valid_input(name: str) -> None:
    for seed in TARGETS[name].seeds:
        try:
            TARGETS[name].decode(seed)
        except NotReady:
            assert name == "rank"  # one of several ranks, and the only one so far


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_malformed_input_raises_what_is_declared(name: str) -> None:
    decode, seeds = TARGETS[name]
    random = Random(name)
    inputs = [*ODD, b"", *(mutate(random, random.choice(seeds)) for _ in range(INPUTS))]
    for data in inputs:
        try:
            decode(data)
        except KVRoomError:
            pass
        except Exception as error:
            raise AssertionError(f"{name}: {data[:200]!r}") from error

"""What tests of real pairs share: the model, prompts with their reference, and one pair behind one router."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts as prompts_
import pytest
from clients import NEW_TOKENS
from fleet import Pair, Server, kvroom_pair, router, running
from prompts import Prompt
from reference import Expected, expected

SHARED = 1000
"""Tokens that the story in `Truth.sequel` has in common with the first long prompt."""
_ROOMS = itertools.count(int.from_bytes(os.urandom(4), "big") << 20)


@dataclass(frozen=True)
class Truth:
    """Prompts and what they are answered."""

    short: list[Prompt]
    long: list[Prompt]
    sequel: Prompt
    answers: dict[Prompt, Expected]

    def __getitem__(self, prompt: Prompt) -> Expected:
        return self.answers[prompt]


def new_room(prefill: Server) -> dict[str, Any]:
    """The parameters of a room that was not used before, at this server's directory."""
    where = {key: prefill.extra[key] for key in ("bootstrap_host", "bootstrap_port")}
    return {**where, "bootstrap_room": next(_ROOMS)}


@pytest.fixture(scope="session")
def model() -> Path:
    """The packaged model's directory."""
    from kvroom.engine.weights import find

    return find("packaged")


@pytest.fixture(scope="session")
def truth(model: Path) -> Truth:
    short, long = prompts_.short(model), prompts_.long(model)
    sequel = long[0][:SHARED] + long[1][-300:]
    every = [*short, *long, sequel]
    return Truth(short, long, sequel, dict(zip(every, expected(model, every, NEW_TOKENS), strict=True)))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers write; shown when one does not start."""
    return tmp_path_factory.mktemp("vllm-logs")


@pytest.fixture(scope="module")
def pair(model: Path, logs: Path, truth: Truth) -> Iterator[Pair]:
    """A prefill and a decode server, the former with a larger pool. After `truth`, so that both have the machine."""
    with running(kvroom_pair(model, logs, prefill_gib=2)) as started:
        yield started


@pytest.fixture(scope="module")
def front(pair: Pair, logs: Path) -> Iterator[str]:
    """The URL of vllm-router in front of the pair."""
    with router([pair.prefill], [pair.decode], logs / "router.log") as url:
        yield url

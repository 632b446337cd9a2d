"""Fixtures of the tests with real servers: the model, prompts with their reference, and the sets of servers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts as prompts_
import pytest
from clients import NEW_TOKENS
from fleet import Server
from prompts import Prompt
from reference import expected
from sets import OTHER_TRANSPORTS, QUICK_ORDER, Garage, Kit

import sampling

SHARED = 500
"""The number of tokens that the story in `Truth.sequel` has in common with the first long prompt."""
_ROOMS = itertools.count(int.from_bytes(os.urandom(4), "big") << 20)


ALWAYS = (0, 1, 2, 3)
"""The long prompts that tests use by number, so that their answers are always needed."""
SHORT_DRAWN, LONG_DRAWN = 4, 2


@dataclass(frozen=True)
class Truth:
    """Prompts and their right answers. A quick run does not compute the answer of every long prompt."""

    short: list[Prompt]
    long: list[Prompt]
    sequel: Prompt
    asked: dict[str, list[Prompt]]
    """The prompts of each kind that are sent in every way of driving a pair; in a quick run, some are drawn."""
    answers: dict[Prompt, list[int]]

    def __getitem__(self, prompt: Prompt) -> list[int]:
        return self.answers[prompt]


def work_out_truth(model: Path, config: pytest.Config) -> Truth:
    """Return the prompts of this run with their reference."""
    short, long = prompts_.short(model), prompts_.long(model)
    always = [long[number] for number in ALWAYS]
    sequel = long[0][:SHARED] + long[1][-150:]
    asked = {"short": short, "long": long}
    if not config.option.full:
        draw = sampling.generator(config, "prompts")
        asked = {
            "short": draw.sample(short, SHORT_DRAWN),
            "long": draw.sample(always, LONG_DRAWN),
        }
    known = list(dict.fromkeys([*short, *always, *asked["long"], sequel]))
    answers = dict(zip(known, expected(model, known, NEW_TOKENS), strict=True))
    return Truth(short, long, sequel, asked, answers)


def new_room(prefill: Server) -> dict[str, Any]:
    """Return the parameters of a new room at this server's directory."""
    where = {key: prefill.extra[key] for key in ("bootstrap_host", "bootstrap_port")}
    return {**where, "bootstrap_room": next(_ROOMS)}


@pytest.fixture(scope="session")
def model() -> Path:
    """Return the directory of the packaged model."""
    from kvroom.engine.weights import find

    return find("packaged")


@pytest.fixture(scope="session")
def truth(model: Path, request: pytest.FixtureRequest) -> Truth:
    """Return the reference, which is computed before the first server starts. That takes a minute or two.

    A server that starts on the same core at the same time hardly runs, whatever the priority of the reference is: it
    was seen to wait for 51 of 55 s.
    """
    return work_out_truth(model, request.config)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the servers' logs."""
    return tmp_path_factory.mktemp("vllm-logs")


@pytest.fixture(scope="session")
def garage(model: Path, logs: Path, request: pytest.FixtureRequest) -> Iterator[Garage]:
    """Yield the sets of servers. A quick run starts the next set in advance, and draws the other transports."""
    items, full = request.session.items, request.config.option.full
    if any("truth" in item.fixturenames for item in items if isinstance(item, pytest.Function)):
        request.getfixturevalue("truth")
    coming = [] if full else [name for name in dict.fromkeys(map(set_of, items)) if name in QUICK_ORDER]
    with closing(Garage(Kit(model, logs, () if full else other_transports(request.config)), coming)) as made:
        yield made


def set_of(item: pytest.Item) -> str:
    """Return the set of servers that a test uses in a quick run, or "" if it uses none."""
    return str(getattr(getattr(item, "module", None), "SERVERS", ""))


def other_transports(config: pytest.Config) -> tuple[str, ...]:
    """Return the transports other than the usual one, in the order that was drawn for `sets.Kit`."""
    drawn = sampling.generator(config, "transports").sample(OTHER_TRANSPORTS, len(OTHER_TRANSPORTS))
    return tuple(drawn)

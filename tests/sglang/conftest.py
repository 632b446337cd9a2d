"""Fixtures of tests with real SGLang servers; processes, waits and logs are those of the vLLM tests' kit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "vllm"))

from aftermath import pytest_runtest_makereport, pytest_runtest_setup  # noqa: F401 - hooks
from answers import Judge, made, reference
from asking import chat
from clients import run
from prompts import QUESTIONS
from servers import Fleet, Server, end, new_fleet, running

CHATS = 3


@dataclass(frozen=True)
class Cast:
    """What most tests share: a pair in float32, and the judge of its answers. `chats`: the answer to each question."""

    pair: Fleet
    judge: Judge
    chats: dict[str, str]


@pytest.fixture(scope="session")
def model() -> Path:
    """Return the packaged model's directory."""
    from kvroom.engine.weights import find

    return find("packaged")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where servers write; shown when one does not start."""
    return tmp_path_factory.mktemp("sglang-logs")


@pytest.fixture(scope="session")
def cast(model: Path, logs: Path) -> Iterator[Cast]:
    """Start the single server and the pair at the same time; the single one ends when it has given the reference."""
    single, pair = Server("single", model, logs / "single.log"), new_fleet(model, logs, "float32")
    with running(single, *pair.servers):
        judge = reference(single, made(model), close=0)
        chats = {question: run(chat(single.url, question)).text for question in QUESTIONS[:CHATS]}
        end([single])
        assert all(chats.values()), chats
        yield Cast(pair, judge, chats)


@pytest.fixture(scope="session")
def pair(cast: Cast) -> Fleet:
    """Return a prefill and a decode server, in float32, of pages of one token."""
    return cast.pair


@pytest.fixture(scope="session")
def judge(cast: Cast) -> Judge:
    """Return the judge of answers in float32: every token must be the single server's."""
    return cast.judge


@pytest.fixture(scope="session")
def chats(cast: Cast) -> dict[str, str]:
    """Return questions and what the single server answers to them at /v1/chat/completions."""
    return cast.chats

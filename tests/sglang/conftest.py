"""Fixtures of the tests with real SGLang servers. The helpers for processes, waits and logs are those of tests/vllm.

Tests that use servers run one after the other on one worker of pytest-xdist. The other worker runs the tests without
servers. A quick run omits the tests of one of the pairs in `BREADTH`, which is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "vllm"))

from aftermath import pytest_runtest_makereport, pytest_runtest_setup  # noqa: F401 - hooks
from answers import STRUCTURED, Judge, clear
from asking import Answer, chat, generate
from clients import run
from prompts import QUESTIONS
from servers import Fleet, Server, end, new_fleet, running

from sampling import amount, generator, takes_all

BREADTH = ("cached", "carried", "four")
"""Fixtures that start two further servers each: with other page sizes, over another transport, as a second pair."""
COMPACT = ("--constrained-json-disable-any-whitespace",)
"""Without this option, the model would fill JSON with blank lines."""


@dataclass(frozen=True)
class Cast:
    """The values that most tests share: a pair in float32, and the answers of the single server."""

    pair: Fleet
    judge: Judge
    chats: dict[str, str]
    """The answers to chat questions, by question."""
    structured: Answer
    """The answer to `STRUCTURED` with the prompt of 17 tokens."""


@pytest.hookimpl(tryfirst=True)  # before tests without a group get one
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests with servers first and into one group; all servers write into `logs`."""
    if not takes_all(config) and not config.option.keyword:  # "-k ipv6" means that pair, whichever would be left out
        asked = [name for name in BREADTH if any(name in getattr(item, "fixturenames", ()) for item in items)]
        if len(asked) == len(BREADTH):
            spared = generator(config, "pairs").choice(BREADTH)
            left_out = [item for item in items if spared in getattr(item, "fixturenames", ())]
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: "logs" not in getattr(item, "fixturenames", ()))
    for item in items:
        if "logs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("servers"))


@pytest.fixture(scope="session")
def model() -> Path:
    """Return the directory of the packaged model."""
    from kvroom.engine.weights import find

    return find("packaged")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the servers' logs."""
    return tmp_path_factory.mktemp("sglang-logs")


@pytest.fixture(scope="session")
def cast(model: Path, logs: Path) -> Iterator[Cast]:
    """Start the single server and the pair at the same time. The single server ends when the reference is complete."""
    single = Server("single", model, logs / "single.log", arguments=COMPACT)
    pair = new_fleet(model, logs, "float32", arguments=COMPACT)
    with running(single, *pair.servers):
        judge = clear(single, model)
        chats = {question: run(chat(single.url, question)).text for question in QUESTIONS[: amount(2, 3)]}
        seventeen = next(prompt for prompt in judge.prompts if len(prompt) == 17)
        structured = run(generate(single.url, seventeen, **STRUCTURED))
        end([single])
        assert all(chats.values()), chats
        assert structured.right, structured
        yield Cast(pair, judge, chats, structured)


@pytest.fixture(scope="session")
def pair(cast: Cast) -> Fleet:
    """Return a prefill server and a decode server in float32, with pages of one token."""
    return cast.pair


@pytest.fixture(scope="session")
def judge(cast: Cast) -> Judge:
    """Return the judge of answers in float32, of which every token must be the single server's."""
    return cast.judge


@pytest.fixture(scope="session")
def chats(cast: Cast) -> dict[str, str]:
    """Return questions and the single server's answers to them at /v1/chat/completions."""
    return cast.chats


@pytest.fixture(scope="session")
def structured(cast: Cast) -> Answer:
    """Return the single server's answer to `STRUCTURED` with the prompt of 17 tokens."""
    return cast.structured

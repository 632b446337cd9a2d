"""Models with sliding windows and states, with prefill and decode in two processes, give the tokens of `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.tiny import Tiny, prompt, tiny

from .helpers import Process, assert_idle, begin_post, finish, get, look, post, running, save_tiny_model
from .test_metrics import of, scrape

PREFILL = ("--page-tokens", "4", "--pages", "256", "--chunk-tokens", "7")
DECODE = ("--page-tokens", "16", "--pages", "64")
LENGTHS = (1, 5, 12, 13, 40, 150)
NEW_TOKENS = 24


class Two(NamedTuple):
    """A prefill and a decode worker without a router."""

    model: Tiny
    prefill: Process
    decode: Process
    rooms: Iterator[int]

    def ask(self, ids: tuple[int, ...]) -> dict[str, Any]:
        """Send one request to both workers, as a router does."""
        body = {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": int(self.prefill.ready.facts["bootstrap_port"]),
            "bootstrap_room": next(self.rooms),
        }
        with begin_post(self.prefill.url, "/generate", body) as connection:
            answer: dict[str, Any] = post(self.decode.url, "/generate", body).json()
            assert finish(connection).status == 200
        return answer


@pytest.fixture(scope="module", params=["gemma3", "lfm2", "qwen3-next"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    directory: Path = save_tiny_model(tmp_path_factory.mktemp("models") / request.param, kind=request.param)
    with ExitStack() as stack:
        prefill = stack.enter_context(running("prefill", "--model", str(directory), *PREFILL))
        decode = stack.enter_context(running("decode", "--model", str(directory), *DECODE))
        yield Two(tiny(request.param), prefill, decode, itertools.count(1))


@pytest.mark.sampled(together="two")
def test_two_processes_generate_what_one_does(two: Two) -> None:
    for length in LENGTHS:
        ids = prompt(length, seed=length)
        answer = two.ask(ids)
        assert answer["output_ids"] == two.model.generate(ids, NEW_TOKENS)
        assert answer["kvroom"][0]["prompt_tokens_computed"] == 0
    assert_idle([two.prefill.url, two.decode.url])
    assert of(scrape(two.prefill.url), "kvroom_prompt_tokens_computed_total") == sum(LENGTHS)


@pytest.mark.sampled(together="two")
def test_the_workers_say_why_they_have_no_prefix_cache(two: Two) -> None:
    group = "swa" if two.model.loaded.shape.sliding else "state"
    for worker in (two.prefill, two.decode):
        said = get(worker.url, "/server_info").json()["prefix_cache"]
        assert said == f"off: the model keeps only the newest tokens of {group}"
        groups = look(worker.url, "/rooms").json()["groups"]
        assert groups[group]["free"] == groups[group]["pages"] > 0

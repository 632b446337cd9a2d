"""A router in front of workers of different sizes: the refusal of the smaller one reaches the client in full."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from kvroom.cli.cluster import wait_for_router
from kvroom.cli.ports import free_port

from .conftest import SECRET
from .helpers import END_S, Process, assert_idle, command, environment, post, running

# A router that hears the refusal of one worker hangs up on the other, which has perhaps not read the request yet, and
# then nothing ends the refused room but its deadline.
SIZES = ("--page-tokens", "4", "--bootstrap-s", "3")
SMALL = (*SIZES, "--pages", "8")
LARGE = (*SIZES, "--pages", "64")


class Uneven(NamedTuple):
    """Three processes that are started one by one, as on several machines."""

    url: str
    prefill: Process
    decode: Process


@pytest.fixture(scope="module", params=[(SMALL, LARGE), (LARGE, SMALL)], ids=["small-prefill", "small-decode"])
def uneven(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Uneven]:
    prefill_sizes, decode_sizes = request.param
    model = ("--model", str(model_dir))
    with ExitStack() as stack:
        prefill = stack.enter_context(running("prefill", *model, *prefill_sizes, KVROOM_SECRET=SECRET))
        decode = stack.enter_context(running("decode", *model, *decode_sizes, KVROOM_SECRET=SECRET))
        port = free_port("127.0.0.1")
        workers = ("--prefill", prefill.url, prefill.ready.facts["bootstrap_port"], "--decode", decode.url)
        router = stack.enter_context(
            subprocess.Popen(
                command("router", "--port", str(port), *workers), env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(wait_for_router(url, 2))
            yield Uneven(url, prefill, decode)
        finally:
            router.kill()
            router.wait(timeout=END_S)


@pytest.mark.sampled(together="uneven")
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_for_one_pool_only_is_400_with_the_whole_message(uneven: Uneven, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "x" * 64, "max_tokens": 8, "stream": stream}
    response = post(uneven.url, "/v1/completions", body)
    assert response.status == 400, response.text
    assert "larger pool" in response.text  # the end of its output
    assert_idle([uneven.prefill.url, uneven.decode.url])


@pytest.mark.sampled(together="uneven")
def test_a_prompt_for_both_is_answered(uneven: Uneven) -> None:
    body = {"model": "tiny", "prompt": "x" * 16, "max_tokens": 8, "temperature": 0}
    assert post(uneven.url, "/v1/completions", body).status == 200
    assert_idle([uneven.prefill.url, uneven.decode.url])

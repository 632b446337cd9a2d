"""OpenAI's client, and requests in the form of SGLang's routers, through real routers to real workers, compared with
plain transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from engine.tiny import tiny

from .conftest import Served
from .helpers import Response, get, post
from .routers import Workers, mini_lb, sglang_router

CHAT: Any = [{"role": "user", "content": "Hello"}]
PROMPT_OF_CHAT = b"<user>Hello\n<assistant>"


def expected(prompt: bytes, count: int = 8) -> str:
    """Return the greedy answer of plain transformers. The end token has no text."""
    return bytes(token for token in tiny().generate(prompt, count) if token < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def workers(cluster: Served) -> Workers:
    listed = get(cluster.url, "/workers").json()["workers"]
    port = next(one["bootstrap_port"] for one in listed if one["worker_type"] == "prefill")
    return Workers(cluster.prefill, port, cluster.decode)


@pytest.fixture(scope="module")
def balancer(workers: Workers) -> Iterator[str]:
    with mini_lb(workers) as url:
        yield url


@pytest.fixture(scope="module")
def routers(cluster: Served, workers: Workers) -> Iterator[dict[str, str]]:
    with sglang_router(workers) as url:
        yield {"smg": cluster.url, "sglang_router": url}


@pytest.fixture(params=["smg", "sglang_router"])
def router(request: pytest.FixtureRequest, routers: dict[str, str]) -> str:
    return routers[request.param]


@pytest.fixture
def client(router: str, served: Served) -> Iterator[OpenAI]:
    """Yield OpenAI's client; after each test the workers must be idle."""
    with OpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def test_chat(client: OpenAI) -> None:
    said = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_completion_tokens=8)
    (choice,) = said.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(PROMPT_OF_CHAT)
    assert choice.finish_reason in ("stop", "length")
    assert said.usage is not None
    assert said.usage.prompt_tokens == len(PROMPT_OF_CHAT)
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_a_stream_of_chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    *spoken, last = chunks
    assert spoken[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == expected(PROMPT_OF_CHAT)
    assert [chunk.choices[0].finish_reason for chunk in spoken[:-1]] == [None] * (len(spoken) - 1)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(PROMPT_OF_CHAT)


def test_completions_whole_and_streamed(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=8)
    assert whole.choices[0].text == expected(b"Hello")
    stream = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected(b"Hello")


def test_a_list_of_prompts_and_n(client: OpenAI) -> None:
    said = client.completions.create(model="tiny", prompt=["Hello", "abc"], n=2, temperature=0, max_tokens=8)
    texts = [choice.text for choice in said.choices]
    assert texts == [expected(b"Hello")] * 2 + [expected(b"abc")] * 2
    assert said.usage is not None
    assert said.usage.prompt_tokens == len("Hello") + len("abc")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_n_choices_count_their_prompt_once(client: OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": CHAT, "n": 3, "seed": 5, "max_tokens": 6}
    if stream:
        *chunks, last = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        usage, spoken = last.usage, {chunk.choices[0].index for chunk in chunks}
    else:
        said = client.chat.completions.create(**fields)
        usage, spoken = said.usage, {choice.index for choice in said.choices}
    assert spoken == {0, 1, 2}
    assert usage is not None
    assert usage.prompt_tokens == len(PROMPT_OF_CHAT)
    assert usage.prompt_tokens_details is not None
    assert 0 <= (usage.prompt_tokens_details.cached_tokens or 0) < len(PROMPT_OF_CHAT)
    assert 3 <= usage.completion_tokens <= 18


def test_stop_strings_and_seeds(client: OpenAI) -> None:
    full = expected(b"Hello")
    said = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=8, stop=[full[3]])
    assert said.choices[0].text == full[: full.index(full[3])]
    assert said.choices[0].finish_reason == "stop"

    def drawn(seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt="Hello", temperature=1, max_tokens=16, seed=seed)
        return answer.choices[0].text

    assert drawn(7) == drawn(7) != drawn(8)


def test_biases_and_min_tokens_change_the_answer(client: OpenAI) -> None:
    said = client.completions.create(
        model="tiny", prompt="Hello", temperature=0, max_tokens=4, logit_bias={str(ord("z")): 100}
    )
    assert said.choices[0].text == "zzzz"
    ends = {"prompt": "Hello", "temperature": 0, "max_tokens": 4, "logit_bias": {"256": 90, str(ord("y")): 80}}
    short = client.completions.create(model="tiny", **ends)  # type: ignore[call-overload]  # a dict of several types
    assert (short.choices[0].text, short.choices[0].finish_reason) == ("", "stop")
    held = client.completions.create(model="tiny", **ends, extra_body={"min_tokens": 3})  # type: ignore[call-overload]
    assert (held.choices[0].text, held.choices[0].finish_reason) == ("yyy", "stop")


def test_null_and_what_asks_for_nothing(client: OpenAI) -> None:
    nothing = {"logit_bias": None, "user": None, "stop": None, "seed": None, "n": 1, "echo": False, "anything": None}
    said = client.completions.create(
        model="tiny", prompt="Hello", temperature=0, max_tokens=8, frequency_penalty=0, extra_body=nothing
    )
    assert said.choices[0].text == expected(b"Hello")


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": 2}, "logprobs=2 is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
    ({"extra_body": {"guided_regex": "a"}}, r"guided_regex=.*is not an option of this server"),
    ({"max_tokens": 400}, "lower max_tokens"),
    ({"seed": -1}, "seed=-1 is not allowed"),
]


@pytest.mark.parametrize(("fields", "named"), ERRORS)
def test_an_error_is_one_that_the_client_knows_and_names_the_option(
    client: OpenAI, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        client.completions.create(model="tiny", prompt="Hello", **fields)


@pytest.mark.parametrize("fields", [fields for fields, _ in ERRORS])
def test_a_stream_that_cannot_start_is_an_error_of_the_same_kind(client: OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):  # sglang_router 0.3.2 does not forward the message as JSON here
        client.completions.create(model="tiny", prompt="Hello", stream=True, **fields)


def test_a_chat_that_is_refused_names_the_option(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"response_format=.*not supported"):
        client.chat.completions.create(model="tiny", messages=CHAT, response_format={"type": "json_object"})


def test_leaving_a_stream_ends_it(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()


def test_generate_names_no_model(served: Served, router: str) -> None:
    """The name of the model is then "unknown" from smg and null from sglang_router."""
    body = {"text": "Hello", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    for model in ({}, {"model": "tiny"}):
        assert post(router, "/generate", {**body, **model}).json()["text"] == expected(b"Hello")


def complete(url: str, **fields: Any) -> Response:
    return post(url, "/v1/completions", {"model": "tiny", "temperature": 0, "max_tokens": 8, **fields})


def test_mini_lb_gives_one_room_to_a_list_of_prompts(served: Served, balancer: str) -> None:
    body = complete(balancer, prompt=["Hello", "abc", [1, 2, 3]]).json()
    assert [choice["text"] for choice in body["choices"]] == [expected(b"Hello"), expected(b"abc"), expected(b"\1\2\3")]
    rooms = [cost["room"] for cost in body["kvroom"]]
    assert rooms == [(rooms[0] + index) % 2**63 for index in range(3)]
    assert body["usage"]["prompt_tokens"] == 5 + 3 + 3


def test_mini_lb_with_choices_of_several_prompts_and_streamed(served: Served, balancer: str) -> None:
    body = complete(balancer, prompt=["Hello", "abc"], n=2).json()
    texts = [expected(b"Hello")] * 2 + [expected(b"abc")] * 2
    assert [choice["text"] for choice in body["choices"]] == texts
    spoken = [""] * 4
    for event in complete(balancer, prompt=["Hello", "abc"], n=2, stream=True).events():
        for choice in event["choices"]:
            spoken[choice["index"]] += choice["text"]
    assert spoken == texts


def test_mini_lb_gives_a_room_to_each_prompt_of_generate(served: Served, balancer: str) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 8, "n": 2}
    bodies = post(balancer, "/generate", {"text": ["Hello", "abc"], "sampling_params": sampling}).json()
    assert [body["text"] for body in bodies] == [expected(b"Hello")] * 2 + [expected(b"abc")] * 2


def test_mini_lb_chats_and_probes(served: Served, balancer: str) -> None:
    answer = post(
        balancer, "/v1/chat/completions", {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 8}
    )
    assert answer.json()["choices"][0]["message"]["content"] == expected(PROMPT_OF_CHAT)
    assert get(balancer, "/health_generate").status == 200

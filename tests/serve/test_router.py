"""Responses through the real router: text, tokens, streams, counts, and errors that name the mistake."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from engine.tiny import prompt, tiny

from .conftest import Served
from .helpers import Response, begin_post, finish, post

GREEDY = {"model": "tiny", "temperature": 0}


def complete(served: Served, **fields: Any) -> Response:
    return post(served.url, "/v1/completions", {**GREEDY, "prompt": "Hello", "max_tokens": 8, **fields})


def chat(served: Served, content: Any = "Hello", **fields: Any) -> Response:
    messages = [{"role": "user", "content": content}]
    return post(served.url, "/v1/chat/completions", {**GREEDY, "messages": messages, "max_tokens": 8, **fields})


def generate(served: Served, **fields: Any) -> Response:
    sampling = {"temperature": 0, "max_new_tokens": 8}
    return post(served.url, "/generate", {"sampling_params": sampling, **fields})


@pytest.mark.parametrize("length", [1, 4, 33, 200])
def test_tokens_equal_those_of_one_process(served: Served, length: int) -> None:
    ids = list(prompt(length, seed=length))
    body = generate(served, input_ids=ids).json()
    assert body["output_ids"] == tiny().generate(ids, 8)
    assert body["meta_info"]["prompt_tokens"] == length
    (cost,) = body["kvroom"]
    assert cost["prompt_tokens_computed"] == 0
    assert cost["pages"] == -(-length // 4)
    assert cost["nbytes"] > 0


def test_completion_in_one_piece(served: Served) -> None:
    body = complete(served, return_token_ids=True, ignore_eos=True).json()
    (choice,) = body["choices"]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == list(b"Hello")
    assert choice["text"] == bytes(choice["token_ids"]).decode(errors="replace")
    details = body["usage"].pop("prompt_tokens_details")
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert details == {"cached_tokens": body["kvroom"][0]["cached_tokens"]}


def test_completion_streamed_says_the_same(served: Served) -> None:
    whole = complete(served, return_token_ids=True).json()
    events = complete(served, return_token_ids=True, stream=True, stream_options={"include_usage": True}).events()
    *chunks, last = events
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["kvroom"][0]["prompt_tokens_computed"] == 0
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


def test_chat_in_one_piece_and_streamed(served: Served) -> None:
    whole = chat(served).json()
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert whole["usage"]["prompt_tokens"] == len("<user>Hello\n<assistant>")
    events = chat(served, stream=True).events()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert all("usage" not in event for event in events)


def test_generate_streams_what_there_is_so_far(served: Served) -> None:
    whole = generate(served, text="Hello").json()
    events = generate(served, text="Hello", stream=True).events()
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["text"] == whole["text"]
    lengths = [len(event["output_ids"]) for event in events]
    assert lengths == list(range(1, len(lengths) + 1))


def test_n_choices(served: Served) -> None:
    body = complete(served, n=3, temperature=1, seed=5, ignore_eos=True, return_token_ids=True).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({tuple(choice["token_ids"]) for choice in body["choices"]}) == 3
    assert body["usage"]["completion_tokens"] == 24
    assert [cost["index"] for cost in body["kvroom"]] == [0, 1, 2]


def test_a_list_of_prompts_streamed(served: Served) -> None:
    alone = [complete(served, prompt=text).json()["choices"][0]["text"] for text in ("Hello", "abc")]
    events = complete(served, prompt=["Hello", "abc"], stream=True).events()
    texts = ["", ""]
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == alone


def test_n_choices_of_chat_and_of_generate(served: Served) -> None:
    assert len(chat(served, n=2).json()["choices"]) == 2
    bodies = generate(served, text="Hello", sampling_params={"n": 2, "temperature": 0, "max_new_tokens": 4}).json()
    assert [body["index"] for body in bodies] == [0, 1]
    assert bodies[0]["output_ids"] == bodies[1]["output_ids"]


def test_n_choices_of_a_list_of_prompts(served: Served) -> None:
    choices = complete(served, prompt=["Hello", "abc"], n=2).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"]
    assert choices[2]["text"] == choices[3]["text"]


def test_a_batch_of_token_ids(served: Served) -> None:
    bodies = generate(served, input_ids=[[1, 2, 3], [4]]).json()
    assert [body["index"] for body in bodies] == [0, 1]
    assert [body["meta_info"]["prompt_tokens"] for body in bodies] == [3, 1]


def test_a_seed_repeats_and_another_differs(served: Served) -> None:
    def ids(seed: int) -> list[int]:
        body = complete(served, temperature=1, seed=seed, ignore_eos=True, max_tokens=16, return_token_ids=True).json()
        tokens: list[int] = body["choices"][0]["token_ids"]
        return tokens

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)


def test_text_ends_before_a_stop_string(served: Served) -> None:
    full = complete(served, ignore_eos=True).json()["choices"][0]["text"]
    stop = full[3]
    choice = complete(served, ignore_eos=True, stop=[stop]).json()["choices"][0]
    assert choice["text"] == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_many_streams_at_once_are_what_each_is_alone(served: Served) -> None:
    prompts = [f"prompt number {number}" for number in range(12)]
    expected = [complete(served, prompt=text).json()["choices"][0]["text"] for text in prompts]
    results: dict[int, str] = {}

    def stream(index: int) -> None:
        events = complete(served, prompt=prompts[index], stream=True).events()
        results[index] = "".join(event["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(len(prompts))] == expected


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"temperature": 101}, "temperature"),
    ("/v1/completions", {"echo": True}, "leave echo out"),
    ("/v1/completions", {"prompt": ""}, "prompt is empty"),
    ("/v1/completions", {"prompt": "x" * 300}, "shorten the prompt"),
    ("/v1/completions", {"max_tokens": 400}, "lower max_tokens"),
    ("/v1/completions", {"seed": -1}, "seed=-1"),
    ("/v1/completions", {"min_tokens": 20}, "min_tokens is 20"),
    ("/v1/completions", {"anything": 1}, "anything=1 is not an option of this server"),
    ("/v1/completions", {"logit_bias": {"9999": 1}}, "logit_bias names a token id outside [0, 257)"),
    ("/v1/chat/completions", {"messages": [{"role": "developer", "content": "x"}]}, "no such role: developer"),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, "not read chat_template_kwargs"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, "is reserved and cannot be set by a request"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 300}]}, "shorten the prompt"),
    ("/generate", {"text": "x", "sampling_params": {"top_p": 0}}, "top_p=0"),
    ("/generate", {"input_ids": [1, 9999]}, "token id outside [0, 257)"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "fields", "words"), REFUSED)
def test_what_the_client_did_wrong_is_400_and_names_it(
    served: Served, path: str, fields: dict[str, Any], words: str, stream: bool
) -> None:
    minimal: dict[str, Any] = {} if path == "/generate" else {"model": "tiny"}
    if path == "/v1/completions":
        minimal["prompt"] = "Hello"
    if path == "/v1/chat/completions":
        minimal["messages"] = [{"role": "user", "content": "Hello"}]
    response = post(served.url, path, {**minimal, **fields, "stream": stream})
    assert response.status == 400, response.text
    assert words in response.text


def test_a_malformed_body_is_400(served: Served) -> None:
    assert post(served.url, "/v1/completions", b'{"model": "tiny", "prompt').status == 400


def test_hanging_up_in_a_stream_ends_it(served: Served) -> None:
    body = {**GREEDY, "prompt": "Hello", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with begin_post(served.url, "/v1/completions", body) as connection:
        assert connection.getresponse().readline().startswith(b"data: ")


def test_hanging_up_before_the_answer_ends_it(served: Served) -> None:
    body = {**GREEDY, "prompt": "Hello", "max_tokens": 240, "ignore_eos": True}
    with begin_post(served.url, "/v1/completions", body):
        pass
    with begin_post(served.url, "/v1/completions", {**body, "max_tokens": 1}) as connection:
        assert finish(connection).status == 200

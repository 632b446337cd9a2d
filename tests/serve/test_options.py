"""The list of options: each has the described effect or is described as having none; every other name is refused."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_type_hints

import pytest

from kvroom.serve.bodies import (
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerateBody,
    SamplingParams,
    StreamOptions,
    TextPart,
)
from kvroom.serve.schema import Call, Route, decode_json, parse
from kvroom.status.answers import BadRequest

ROUTED = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 5}


class Place(NamedTuple):
    """An object within the body of a route. `path` is its prefix in error messages."""

    route: Route
    kind: type[Body]
    path: str = ""

    def body(self, **fields: Any) -> dict[str, Any]:
        """Return a valid body with further fields in this place."""
        inner: dict[str, Any] = {"role": "user", "content": "Hello"}
        if self.kind is TextPart:
            inner["content"] = [{"type": "text", "text": "Hello", **fields}]
        elif self.kind is ChatMessage:
            inner.update(fields)
        bodies: dict[Route, dict[str, Any]] = {
            "generate": {"text": "Hello", "sampling_params": {}},
            "completions": {"prompt": "Hello"},
            "chat": {"messages": [inner]},
        }
        body = bodies[self.route]
        if self.kind is SamplingParams:
            body["sampling_params"] = fields
        elif self.kind is StreamOptions:
            body.update(stream=True, stream_options=fields)
        elif not self.path:
            body.update(fields)
        return {**ROUTED, **body}

    def call(self, **fields: Any) -> Call:
        return parse(self.route, decode_json(json.dumps(self.body(**fields)).encode()))


PLACES = [
    Place("generate", GenerateBody),
    Place("generate", SamplingParams, "sampling_params."),
    Place("completions", CompletionBody),
    Place("completions", StreamOptions, "stream_options."),
    Place("chat", ChatBody),
    Place("chat", StreamOptions, "stream_options."),
    Place("chat", ChatMessage, "messages[0]."),
    Place("chat", TextPart, "messages[0].content[0]."),
]
AT = {place.path or place.route: place for place in PLACES}


def is_inert(kind: type[Body], name: str) -> bool:
    """Return True if a field is described as having no effect."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return any((meta.extra or {}).get("inert", False) for meta in hint.__metadata__)


def fields(inert: bool) -> list[Any]:
    return [
        pytest.param(place, name, id=f"{place.route}-{place.path}{name}")
        for place in PLACES
        for name in place.kind.__struct_fields__
        if is_inert(place.kind, name) == inert
    ]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.route}-{place.path}")
@pytest.mark.parametrize("name", ["anything", "temprature", "Stream", "", "bootstrap_hosts", "$", "a.b", "x" * 10_000])
def test_a_name_that_is_not_on_the_list_is_refused_by_name(place: Place, name: str) -> None:
    with pytest.raises(BadRequest, match=r"is not an option of this server; leave .* out") as caught:
        place.call(**{name: 0})
    assert caught.value.param == f"{place.path}{name[:80]}"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.route}-{place.path}")
def test_null_is_the_default_whatever_the_name(place: Place) -> None:
    required = {"prompt", "messages", "text", "role", "type", *ROUTED}
    names = [*place.kind.__struct_fields__, *place.kind.NEUTRAL, "anything"]
    for name in names:
        if name not in required and not (place.kind is ChatMessage and name == "content"):
            assert place.call(**{name: None}) == place.call(), name
    assert place.call(**dict.fromkeys(set(names) - required - {"content"})) == place.call()


def test_null_is_the_default_further_in() -> None:
    assert AT["chat"].call(logit_bias={"5": None}, chat_template_kwargs={"a": None}) == AT["chat"].call()
    assert AT["generate"].call(model=None, sampling_params=None) == AT["generate"].call()
    assert AT["messages[0]."].call(content=None) == AT["messages[0]."].call(content="")


NEUTRAL = [
    pytest.param(place, name, id=f"{place.route}-{place.path}{name}") for place in PLACES for name in place.kind.NEUTRAL
]


@pytest.mark.parametrize(("place", "name"), NEUTRAL)
def test_an_option_that_is_not_here_is_allowed_as_long_as_it_asks_for_nothing(place: Place, name: str) -> None:
    for neutral in place.kind.NEUTRAL[name]:
        assert place.call(**{name: neutral}) == place.call()
    for other in ("something", 7, 0.5, [1], {"type": "json_object"}):
        with pytest.raises(BadRequest, match="is not supported by this server") as caught:
            place.call(**{name: other})
        assert caught.value.param == f"{place.path}{name}"


@pytest.mark.parametrize(
    ("place", "name"), [case for case in NEUTRAL if case.values[1] in ("best_of", "echo", "store")]
)
def test_in_json_true_is_not_one_and_one_is_not_true(place: Place, name: str) -> None:
    (neutral,) = place.kind.NEUTRAL[name]
    with pytest.raises(BadRequest, match=f"{name}="):
        place.call(**{name: int(neutral) if isinstance(neutral, bool) else bool(neutral)})


def test_in_json_one_and_one_point_nought_are_the_same() -> None:
    assert AT["completions"].call(repetition_penalty=1.0, frequency_penalty=0.0) == AT["completions"].call()


INERT_VALUES: dict[str, Any] = {
    "rid": "r", "request_id": "r", "user": "u", "kv_transfer_params": {"do_remote_decode": True}, "routing_key": "k",
    "conversation_id": "c", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k",
    "parallel_tool_calls": False, "separate_reasoning": False, "stream_reasoning": False,
}  # fmt: skip


@pytest.mark.parametrize(("place", "name"), fields(inert=True))
def test_a_field_without_effect_changes_nothing_and_says_why(place: Place, name: str) -> None:
    assert place.call(**{name: INERT_VALUES[name]}) == place.call()
    hint = get_type_hints(place.kind, include_extras=True)[name]
    assert any(len(meta.description or "") > 10 for meta in hint.__metadata__)


EFFECTIVE_VALUES: dict[str, Any] = {
    "bootstrap_host": "127.0.0.2", "bootstrap_port": 1, "bootstrap_room": 6, "model": "m", "stream": True,
    "cache_salt": "s", "n": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5, "min_tokens": 1,
    "min_new_tokens": 1, "max_tokens": 2, "max_completion_tokens": 2, "max_new_tokens": 2, "logit_bias": {"5": 1},
    "seed": 1, "sampling_seed": 1, "stop": "x", "ignore_eos": True, "return_token_ids": True, "prompt": "other",
    "text": "other", "include_usage": True, "continuous_usage_stats": True, "messages": [{"role": "user"}],
    "add_generation_prompt": False, "continue_final_message": True, "chat_template_kwargs": {"a": 1}, "role": "system",
    "content": "other", "name": "bob", "sampling_params": {"seed": None, "top_k": 5},
}  # fmt: skip
ELSEWHERE = {"input_ids", "stream_options", "type"}  # these need another field, or have only one value


@pytest.mark.parametrize(("place", "name"), fields(inert=False))
def test_every_other_field_arrives(place: Place, name: str) -> None:
    if name in ELSEWHERE:
        return
    assert place.call(**{name: EFFECTIVE_VALUES[name]}) != place.call()


def test_token_ids_arrive() -> None:
    assert AT["generate"].call(text=None, input_ids=[1, 2]).prompts == ([1, 2],)


SWALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("sampling_params.", {"regex": "[0-9]+", "json_schema": "{}", "structural_tag": "{}", "stop_regex": "Par",
                          "no_stop_trim": True, "skip_special_tokens": False, "custom_params": {"a": 1}, "ebnf": "x",
                          "frequency_penalty": 0.5, "beam_width": 2}),
    ("generate", {"video_data": "x.mp4", "modalities": ["video"], "session_params": {"id": "1"},
                  "return_hidden_states": True, "custom_logit_processor": "abc", "logprob_start_len": 0,
                  "token_ids_logprob": [1], "top_logprobs_num": 2, "lora_path": "a", "input_embeds": [[0.1]],
                  "extra_key": "x", "priority": 3, "data_parallel_rank": 3}),
    ("completions", {"guided_regex": "[0-9]+", "guided_json": {}, "guided_choice": ["a"], "structured_outputs": {},
                     "bad_words": [" Paris"], "allowed_token_ids": [5], "truncate_prompt_tokens": 1,
                     "include_stop_str_in_output": True, "prompt_logprobs": 1, "use_beam_search": True,
                     "length_penalty": 2.0, "add_special_tokens": False, "logits_processors": ["x"], "regex": "[0-9]+",
                     "skip_special_tokens": False, "return_hidden_states": True, "stop_token_ids": [5], "suffix": "x",
                     "echo": True, "best_of": 2, "logprobs": 5, "presence_penalty": 1}),
    ("chat", {"guided_json": {}, "chat_template": "X", "documents": [{"text": "x"}], "reasoning_effort": "high",
              "modalities": ["text", "audio"], "audio": {"voice": "alloy"}, "prediction": {"type": "content"},
              "verbosity": "low", "web_search_options": {}, "function_call": "auto", "prompt_logprobs": 1,
              "tools": [{}], "tool_choice": "required", "functions": [{}], "top_logprobs": 2, "logprobs": True,
              "response_format": {"type": "json_object"}, "service_tier": "flex", "store": True, "reasoning": {},
              "thinking": {"type": "enabled"}, "mm_processor_kwargs": {}, "vllm_xargs": {"a": 1}}),
    ("stream_options.", {"include_obfuscation": True, "anything": 1}),
    ("messages[0].", {"tool_calls": [{}], "tool_call_id": "1", "reasoning_content": "x", "refusal": "x", "audio": {}}),
    ("messages[0].content[0].", {"image_url": {"url": "x"}, "cache_control": {"type": "ephemeral"}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "name", "value"), [(where, name, value) for where, given in SWALLOWED for name, value in given.items()]
)
def test_what_clients_send_and_this_server_does_not_do_is_refused(where: str, name: str, value: Any) -> None:
    place = AT[where]
    with pytest.raises(BadRequest, match=r"leave .* out") as caught:
        place.call(**{name: value})
    assert caught.value.param == f"{place.path}{name}"


ROUTERS: dict[str, tuple[Route, dict[str, Any]]] = {
    "smg-generate": ("generate", {
        "text": "a", "model": "unknown", "sampling_params": {}, "return_text_in_logprobs": False, "stream": False,
        "log_metrics": True, "background": False, "no_logs": False, "return_bytes": False, "return_entropy": False}),
    "smg-completions": ("completions", {"model": "tiny", "prompt": "a", "echo": False, "stream": False}),
    "smg-chat": ("chat", {"messages": [{"role": "user", "content": "a"}], "model": "tiny", "logprobs": False}),
    "sglang_router-generate": ("generate", {
        "text": "a", "model": None, "sampling_params": {}, "return_text_in_logprobs": False, "stream": False,
        "log_metrics": True, "return_hidden_states": False, "background": False, "no_logs": False,
        "return_bytes": False, "return_entropy": False}),
    "sglang_router-completions": ("completions", {
        "model": "tiny", "prompt": "a", "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False,
        "skip_special_tokens": True, "return_hidden_states": False}),
    "sglang_router-chat": ("chat", {
        "messages": [{"role": "user", "content": "a"}], "model": "tiny", "logprobs": False, "stream": False,
        "no_stop_trim": False, "ignore_eos": False, "continue_final_message": False, "skip_special_tokens": True,
        "separate_reasoning": True, "stream_reasoning": True, "return_hidden_states": False}),
    "vllm-router-completions": ("completions", {
        "model": "tiny", "prompt": "a", "stream": False, "echo": False, "no_stop_trim": False, "ignore_eos": False,
        "skip_special_tokens": True, "return_hidden_states": False, "max_tokens": 1, "min_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}}),
    "vllm-router-chat": ("chat", {
        "model": "tiny", "messages": [{"role": "user", "content": "a"}], "logprobs": False, "no_stop_trim": False,
        "ignore_eos": False, "continue_final_message": False, "skip_special_tokens": True, "separate_reasoning": True,
        "stream_reasoning": True, "return_hidden_states": False, "include_reasoning": True, "store": False,
        "service_tier": "auto"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_what_routers_add_is_allowed(name: str) -> None:
    """The bodies are those of smg 1.13, sglang-router 0.3.2 and vllm-router 0.1.17, without their rooms."""
    route, body = ROUTERS[name]
    parse(route, decode_json(json.dumps({**ROUTED, **body}).encode()))

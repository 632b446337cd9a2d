"""The schema of requests: accepted values have the right meaning, and errors name field, value and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroom.errors import InvalidRequest
from kvroom.serve.bodies import MAX_SEQUENCES, ChatMessage
from kvroom.serve.schema import Call, RoomEnd, Route, decode_json, derived_room, named_legs, parse
from kvroom.status.answers import BadRequest

ROUTED: dict[str, Any] = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}
CHAT = [{"role": "user", "content": "Hello"}]
MINIMAL: dict[Route, dict[str, Any]] = {
    "generate": {"text": "Hello"},
    "completions": {"prompt": "Hello"},
    "chat": {"messages": CHAT},
}


def call(route: Route, **fields: Any) -> Call:
    """Parse a body as a client sends it through a router."""
    return parse(route, decode_json(json.dumps({**ROUTED, **MINIMAL[route], **fields}).encode()))


def rooms(parsed: Call) -> tuple[int, ...]:
    return tuple(leg.room for leg in parsed.legs)


def each(count: int) -> dict[str, Any]:
    """Return the fields that the router adds for `count` sequences."""
    return {
        "bootstrap_host": ["127.0.0.1"] * count,
        "bootstrap_port": [8998] * count,
        "bootstrap_room": list(range(count)),
    }


@pytest.mark.parametrize("route", MINIMAL)
def test_a_minimal_body_is_enough(route: Route) -> None:
    parsed = call(route)
    assert parsed.legs == (RoomEnd(2**63 - 1, "127.0.0.1:8998"),)
    assert len(parsed.prompts) == 1
    assert not parsed.stream


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("fd00::1", "[fd00::1]:8998"),
        ("[::1]", "[::1]:8998"),
        ("[fe80::1%25eth0]", "[fe80::1%eth0]:8998"),
        ("::ffff:10.0.0.1", "10.0.0.1:8998"),
        ("Worker-3.", "worker-3:8998"),
    ],
)
def test_bootstrap_hosts_are_read_in_every_form(host: str, address: str) -> None:
    assert call("completions", bootstrap_host=host).legs[0].address == address


def test_lengths_default_as_in_the_apis_they_come_from() -> None:
    assert call("completions").sampling.max_tokens == 16
    assert call("generate").sampling.max_tokens == 128
    assert call("chat").sampling.max_tokens is None
    assert call("chat", max_tokens=3).sampling.max_tokens == 3
    assert call("chat", max_tokens=3, max_completion_tokens=4).sampling.max_tokens == 4


def test_sampling_fields_arrive() -> None:
    openai = call("chat", temperature=0, top_p=0.5, top_k=7, seed=11, stop="END", ignore_eos=True).sampling
    sglang = call(
        "generate",
        sampling_params={
            "temperature": 0, "top_p": 0.5, "top_k": 7, "sampling_seed": 11, "stop": ["END"], "ignore_eos": True,
            "max_new_tokens": 5,
        },
    ).sampling  # fmt: skip
    for sampling in (openai, sglang):
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.0, 0.5, 7, 11)
        assert sampling.stop == ("END",)
        assert sampling.ignore_eos
    assert sglang.max_tokens == 5


def test_n_choices_are_n_prompts_in_rooms_of_their_own() -> None:
    parsed = call("completions", n=3, **each(3))
    assert parsed.prompts == ("Hello",) * 3
    assert rooms(parsed) == (0, 1, 2)
    assert parsed.batched


def test_one_room_for_n_choices_is_the_first_and_gives_the_others() -> None:
    found = rooms(call("completions", n=3))
    assert found == rooms(call("completions", n=3))
    assert found[0] == ROUTED["bootstrap_room"]
    assert len(set(found)) == 3


@pytest.mark.parametrize("route", ["completions", "generate"])
@pytest.mark.parametrize(("first", "expected"), [(7, (7, 8, 9)), (2**63 - 2, (2**63 - 2, 2**63 - 1, 0))])
def test_one_room_for_several_prompts_counts_up_as_sglang_does(
    route: Route, first: int, expected: tuple[int, ...]
) -> None:
    field = "prompt" if route == "completions" else "text"
    assert rooms(call(route, **{field: ["a", "b", "c"]}, bootstrap_room=first)) == expected


@pytest.mark.parametrize("route", ["completions", "generate"])
def test_one_room_for_choices_of_several_prompts(route: Route) -> None:
    fields: dict[str, Any] = {"prompt": ["a", "b"], "n": 2}
    if route == "generate":
        fields = {"input_ids": [[1], [2, 3]], "text": None, "sampling_params": {"n": 2}}
    parsed = call(route, **fields, bootstrap_room=7)
    assert rooms(parsed) == (7, derived_room(7, 1), 8, derived_room(8, 1))
    assert parsed.samples == 2


def test_a_list_with_one_room_is_the_room_of_one_prompt_only() -> None:
    assert rooms(call("completions", prompt=["a"], bootstrap_room=[7])) == (7,)
    with pytest.raises(BadRequest, match=r"1 value\(s\) for 2 prompt"):
        call("completions", prompt=["a", "b"], bootstrap_room=[7])


def test_n_choices_of_a_list_of_prompts() -> None:
    parsed = call("completions", prompt=["a", "b"], n=2, **each(2))
    assert parsed.prompts == ("a", "a", "b", "b")
    assert rooms(parsed) == (0, derived_room(0, 1), 1, derived_room(1, 1))


@given(st.integers(0, 2**63 - 1), st.integers(0, MAX_SEQUENCES))
def test_derived_rooms_are_rooms(room: int, index: int) -> None:
    assert 0 <= derived_room(room, index) < 2**63


def test_a_list_of_prompts_has_a_room_each() -> None:
    parsed = call("completions", prompt=["a", [1, 2]], **each(2))
    assert parsed.prompts == ("a", [1, 2])
    assert rooms(parsed) == (0, 1)


def test_a_list_of_token_ids_is_one_prompt() -> None:
    assert call("completions", prompt=[1, 2, 3]).prompts == ([1, 2, 3],)
    assert not call("completions", prompt=[1, 2, 3]).batched


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (turns,) = call("chat", messages=[{"role": "user", "content": parts}]).prompts
    assert [turn.plain() for turn in turns if isinstance(turn, ChatMessage)] == [{"role": "user", "content": "ab"}]


BAD: list[tuple[Route, dict[str, Any], str | None, str]] = [
    ("completions", {"max_tokens": "three"}, "max_tokens", '"three"'),
    ("completions", {"max_tokens": 0}, "max_tokens", ">= 1"),
    ("completions", {"temperature": -0.5}, "temperature", "-0.5"),
    ("completions", {"top_p": 1.5}, "top_p", "1.5"),
    ("completions", {"top_k": -2}, "top_k", "-2"),
    ("completions", {"seed": -1}, "seed", "-1"),
    ("completions", {"n": 0}, "n", "n=0"),
    ("completions", {"stream": "yes"}, "stream", '"yes"'),
    ("completions", {"stop": ["a", ""]}, "stop[1]", '""'),
    ("completions", {"stop": ["x"] * 17}, "stop", "<= 16"),
    ("completions", {"prompt": []}, "prompt", "empty"),
    ("completions", {"prompt": ["a", 3]}, "prompt", "mixes"),
    ("completions", {"prompt": None}, "prompt", "prompt is missing"),
    ("completions", {"prompt": [1, -2]}, "prompt[1]", "-2"),
    ("completions", {"logprobs": 2}, "logprobs", "logprobs=2 is not supported"),
    ("completions", {"echo": True}, "echo", "leave echo out"),
    ("chat", {"messages": []}, "messages", "length >= 1"),
    ("chat", {"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", ""),
    ("chat", {"tools": [{"type": "function"}]}, "tools", "not supported"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ("generate", {"input_ids": [1]}, "text", "exactly one"),
    ("generate", {"text": None}, "text", "exactly one"),
    ("generate", {"sampling_params": {"top_p": 0}}, "sampling_params.top_p", "0"),
    ("generate", {"sampling_params": {"min_p": 1.5}}, "sampling_params.min_p", "1.5"),
    ("generate", {"sampling_params": {"min_new_tokens": -1}}, "sampling_params.min_new_tokens", "-1"),
    ("generate", {"sampling_params": {"logit_bias": {"5": 101}}}, "sampling_params.logit_bias[...]", "<= 100.0"),
    ("completions", {"logit_bias": {"the": 1}}, "logit_bias", '"the" for a token id'),
    ("completions", {"logit_bias": {"05": 1}}, "logit_bias", '"05" for a token id'),
    ("completions", {"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "<= 1024"),
    ("completions", {"cache_salt": ""}, "cache_salt", ">= 1"),
    ("chat", {"cache_salt": "x" * 513}, "cache_salt", "<= 512"),
    ("generate", {"cache_salt": 5}, "cache_salt", "5"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "streams only"),
    ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "1"),
    ("chat", {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
    ("completions", {"bootstrap_host": "a b"}, "bootstrap_host", "'a b' is not a host"),
    ("completions", {"bootstrap_host": ""}, "bootstrap_host", "empty"),
    ("completions", {"bootstrap_host": "127.0.0.1:8998"}, "bootstrap_host", "give the port separately"),
    ("generate", {"bootstrap_host": "http://127.0.0.1"}, "bootstrap_host", "a URL"),
    ("chat", {"bootstrap_host": "::"}, "bootstrap_host", "cannot be dialled"),
    ("chat", {"bootstrap_host": "x" * 5000}, "bootstrap_host", "too long"),
    ("completions", {"bootstrap_room": 2**63}, "bootstrap_room", str(2**63)),
    ("completions", {"bootstrap_room": -1}, "bootstrap_room", "-1"),
    ("completions", {"bootstrap_room": "7"}, "bootstrap_room", '"7"'),
    ("completions", {"bootstrap_room": None}, "bootstrap_room", "send the request to the router"),
    ("completions", {"bootstrap_port": None}, "bootstrap_port", "send the request to the router"),
    ("completions", {"bootstrap_port": 70000}, "bootstrap_port", "70000"),
    ("completions", {"n": 3, **each(2)}, "bootstrap_room", "2 value(s) for 1 prompt(s) with n=3"),
    ("completions", {"n": 3, **each(3), "bootstrap_port": [1, 2]}, "bootstrap_port", "2 value(s)"),
    ("completions", {"n": 2, **each(2), "bootstrap_room": [5, 5]}, "bootstrap_room", "twice"),
    ("completions", {"prompt": ["a", "b"], "n": 2, **each(3)}, "bootstrap_room", "3 value(s) for 2 prompt(s)"),
    ("completions", {"n": MAX_SEQUENCES + 1}, "n", str(MAX_SEQUENCES)),
    ("completions", {"prompt": ["a"] * 65, "n": 2, **each(130)}, "n", "130 sequences"),
]


@pytest.mark.parametrize(("route", "fields", "param", "words"), BAD)
def test_what_is_not_allowed_is_named(route: Route, fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        call(route, **fields)
    assert caught.value.param == param
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt": "a\xff"}', b'{"\xff": 1}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xc3', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1}}', b"\xef\xbb\xbf{}",
        b'{"a": ' * 33 + b"1" + b"}" * 33, b'{"a": ' * 900 + b"1" + b"}" * 900,
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused_in_words(raw: bytes) -> None:
    with pytest.raises(BadRequest, match=r"the body is .*send one"):
        decode_json(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="send one"):
        decode_json(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(
    {"n", "stop", "seed", "stream", "prompt", "messages", "text", "input_ids", "sampling_params"} | set(ROUTED)
)


@given(st.sampled_from(sorted(MINIMAL)), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_any_json_is_a_call_or_a_bad_request(route: Route, fields: dict[str, Any]) -> None:
    try:
        parsed = call(route, **fields)
    except InvalidRequest:
        return
    assert len(parsed.prompts) == len(parsed.legs) > 0


@given(st.sampled_from(sorted(MINIMAL)), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_the_legs_of_any_json_are_found_or_not_and_are_those_of_the_call(route: Route, fields: dict[str, Any]) -> None:
    body = decode_json(json.dumps({**ROUTED, **MINIMAL[route], **fields}).encode())
    found = named_legs(route, body)
    try:
        assert parse(route, body).legs == found
    except InvalidRequest:
        assert all(0 <= room < 2**63 and isinstance(address, str) for room, address in found)


REFUSED_LEGS: list[tuple[Route, dict[str, Any], tuple[RoomEnd, ...]]] = [
    ("completions", {"top_p": 2}, (RoomEnd(5, "[::1]:8998"),)),
    ("completions", {"unknown": 2, "prompt": ["a", "b"]}, (RoomEnd(5, "[::1]:8998"), RoomEnd(6, "[::1]:8998"))),
    (
        "generate",
        {"sampling_params": {"n": 2, "regex": "a"}},
        (RoomEnd(5, "[::1]:8998"), RoomEnd(derived_room(5, 1), "[::1]:8998")),
    ),
    ("chat", {"bootstrap_host": "a b"}, (RoomEnd(5, ""),)),
    ("chat", {"bootstrap_port": "x"}, (RoomEnd(5, ""),)),
    ("chat", {"bootstrap_room": "x"}, ()),
    ("completions", {"n": "x"}, ()),
    ("completions", {"n": 10**9}, ()),
]


@pytest.mark.parametrize(("route", "fields", "legs"), REFUSED_LEGS)
def test_a_refused_body_tells_whom_to_tell(route: Route, fields: dict[str, Any], legs: tuple[RoomEnd, ...]) -> None:
    body = {**ROUTED, **MINIMAL[route], "bootstrap_host": "[::1]", "bootstrap_room": 5, **fields}
    with pytest.raises(BadRequest):
        parse(route, body)
    assert named_legs(route, body) == legs

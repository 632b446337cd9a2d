"""The conversion of a checked call to engine requests: the chat template as in transformers, and every option."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.tiny import EOS, byte_tokenizer
from kvroom.core.trace import RequestTrace
from kvroom.engine.request import Request
from kvroom.serve.prompts import Prompts
from kvroom.serve.schema import Route, decode_json, parse
from kvroom.status.answers import BadRequest

from .helpers import TEMPLATE

ROUTED = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "So it be"}]
PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{# name add_generation_prompt #}"
TAGGED = "{% for m in messages %}{% generation %}{{ m['content'] ~ m['name'] }}{% endgeneration %}{% endfor %}"


def requests(route: Route, template: Any = TEMPLATE, **fields: Any) -> list[Request]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    body = decode_json(json.dumps({**ROUTED, **fields}).encode())
    return Prompts(tokenizer, 256, {EOS}).requests(parse(route, body), RequestTrace("r"))


def text(template: Any = TEMPLATE, **fields: Any) -> str:
    (request,) = requests("chat", template, **{"messages": TURNS, **fields})
    return bytes(request.prompt_ids).decode()


def rendered(template: str, turns: Any, **options: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    said: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return said


def test_the_template_is_rendered_as_transformers_does() -> None:
    assert text() == rendered(TEMPLATE, TURNS, add_generation_prompt=True)
    assert text(add_generation_prompt=True) == text()
    assert text(add_generation_prompt=False) == rendered(TEMPLATE, TURNS, add_generation_prompt=False) != text()
    continued = text(continue_final_message=True)
    assert continued == rendered(TEMPLATE, TURNS, continue_final_message=True)
    assert continued.endswith("So it be")
    assert text(continue_final_message=True, add_generation_prompt=False) == continued
    named = [{**TURNS[0], "name": "bob"}]
    assert (
        text(messages=named) == rendered(TEMPLATE, named, add_generation_prompt=True) == "<user bob>Hello\n<assistant>"
    )
    moody = text(chat_template_kwargs={"mood": "glad"})
    assert moody == rendered(TEMPLATE, TURNS, add_generation_prompt=True, mood="glad") != text()


REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    (TEMPLATE, {"chat_template_kwargs": {"thinking": False}}, "chat_template_kwargs.thinking", "not read"),
    (TEMPLATE, {"chat_template_kwargs": {"m": 1}}, "chat_template_kwargs.m", "not read"),  # a variable of its own
    (TEMPLATE, {"chat_template_kwargs": {"assistant": 1}}, "chat_template_kwargs.assistant", "not read"),  # its text
    (TEMPLATE, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "is reserved"),
    (TEMPLATE, {"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt",
     "is reserved and cannot be set"),
    (TEMPLATE, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "not read"),
    (TEMPLATE, {"chat_template_kwargs": {"x" * 5000: 1}}, "chat_template_kwargs." + "x" * 40, "not read"),
    (TEMPLATE, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no such role: tool"),
    (TEMPLATE, {"chat_template_kwargs": {"raise_exception": 5}, "messages": [{"role": "x"}]}, "messages", "callable"),
    (PLAIN, {"messages": [*TURNS, {"role": "user", "name": "bob"}]}, "messages[2].name", "not read"),
    (PLAIN, {"add_generation_prompt": False}, "add_generation_prompt", "not read"),
    ("{{ messages | length }}", {"continue_final_message": True}, "messages", "not an accepted field"),
    (None, {}, "messages", "no chat template"),
    ({"tool_use": TEMPLATE}, {}, "messages", "multiple chat templates"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "fields", "param", "words"), REFUSED)
def test_what_the_template_does_not_do_is_refused(
    template: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        text(template, **fields)
    assert caught.value.param == param
    assert len(str(caught.value)) < 600


def test_templates_with_tags_of_transformers_are_read_too() -> None:
    assert text(TAGGED, messages=[{**TURNS[0], "name": "!"}]) == "Hello!"
    with pytest.raises(BadRequest, match="not read"):
        text(TAGGED, chat_template_kwargs={"enable_thinking": True})


def test_of_several_templates_the_default_is_read() -> None:
    assert text({"default": TEMPLATE, "tool_use": PLAIN}, chat_template_kwargs={"mood": "sad"}).endswith("(sad)")


def test_every_option_reaches_the_engine_on_every_route() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.1,
        "stop": ["END"],
        "logit_bias": {"9": 1, "5": -2},
    }
    openai = {**sampling, "seed": 3, "min_tokens": 2, "n": 2, "cache_salt": "s"}
    sglang = {**sampling, "sampling_seed": 3, "min_new_tokens": 2, "max_new_tokens": 8, "n": 2}
    for made in (
        requests("completions", prompt="Hello", max_tokens=8, **openai),
        requests("chat", PLAIN[: PLAIN.index("{#")] + "{# #}", messages=TURNS, max_completion_tokens=8, **openai),
        requests("generate", text="Hello", sampling_params=sglang, cache_salt="s"),
    ):
        assert [request.seed for request in made] == [3, 4]
        assert len({request.bootstrap_room for request in made}) == 2
        for request in made:
            assert request.prompt_ids == made[0].prompt_ids != ()
            assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.6, 7, 0.1)
            assert request.logit_bias == ((5, -2.0), (9, 1.0))
            assert (request.min_tokens, request.max_tokens, request.withheld) == (2, 8, (EOS,))
            assert (request.stop, request.cache_salt, request.ignore_eos) == (("END",), "s", False)


def test_nothing_is_withheld_where_nothing_ends_the_answer() -> None:
    (request,) = requests("completions", prompt="Hello", min_tokens=2, ignore_eos=True)
    assert request.withheld == ()
    (request,) = requests("completions", prompt="Hello")
    assert request.withheld == ()

"""From a checked call to the engine's requests: chat template, tokenizer, and how long an answer may become."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2 import meta

from kvroom.engine.request import Request
from kvroom.serve.bodies import ChatMessage
from kvroom.serve.schema import Call, Prompt, RoomEnd, Template
from kvroom.status import BadRequest

_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
"""Exceptions of a template that gets messages or variables for which it was not written."""

_SHOWN_CHARS = 300


class Prompts:
    """Turns calls into requests for one model.

    `tokenizer` is a transformers tokenizer; `room_tokens` is how many tokens (prompt and answer) one sequence may have
    here, and bounds an answer whose length the client left open; `eos_ids` are the tokens that end one.
    """

    def __init__(self, tokenizer: Any, room_tokens: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._room_tokens = room_tokens
        self._eos_ids = tuple(sorted(eos_ids))
        self._most_chars = room_tokens * max(map(len, tokenizer.get_vocab()))
        template = _source_of_template(tokenizer)
        self._names, self._variables = _names_in(template), _variables_in(template)
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset(parameters) | {"messages"}

    def requests(self, call: Call, request_id: str) -> list[Request]:
        """One request per sequence; with a seed, sequence i of the call takes seed + i. Raises `BadRequest`."""
        encoded = [self._encode(call, prompt) for prompt in call.prompts[:: call.samples]]
        return [
            self._request(call, encoded[index // call.samples], f"{request_id}-{index}", index, leg)
            for index, leg in enumerate(call.legs)
        ]

    def _request(self, call: Call, prompt_ids: tuple[int, ...], request_id: str, index: int, leg: RoomEnd) -> Request:
        wanted = call.sampling
        left = max(1, self._room_tokens - len(prompt_ids))
        return Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            bootstrap_room=leg.room,
            bootstrap_addr=leg.address,
            max_tokens=left if wanted.max_tokens is None else wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            min_p=wanted.min_p,
            logit_bias=wanted.logit_bias,
            min_tokens=wanted.min_tokens,
            withheld=self._eos_ids if wanted.min_tokens > 0 and not wanted.ignore_eos else (),
            seed=None if wanted.seed is None else (wanted.seed + index) % 2**63,
            stop=wanted.stop,
            ignore_eos=wanted.ignore_eos,
            cache_salt=call.cache_salt,
        )

    def _encode(self, call: Call, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            self._check_length(prompt, "prompt")
            return tuple(self._tokenizer.encode(prompt))
        if call.template is not None:
            return self._encode_chat([turn for turn in prompt if isinstance(turn, ChatMessage)], call.template)
        return tuple(token for token in prompt if isinstance(token, int))

    def _encode_chat(self, turns: list[ChatMessage], template: Template) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        self._check_read(turns, template)
        try:
            text = self._tokenizer.apply_chat_template(
                [turn.plain() for turn in turns],
                tokenize=False,
                add_generation_prompt=template.add_generation_prompt,
                continue_final_message=template.continue_final_message,
                **template.variables,
            )
        except _TEMPLATE_FAULTS as fault:
            why = str(fault)[:_SHOWN_CHARS]  # it may quote all messages
            raise BadRequest(f"the model's chat template refuses these messages: {why}", "messages") from fault
        self._check_length(text, "messages")
        # The template writes the special tokens itself.
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _check_length(self, text: str, where: str) -> None:
        """Refuse a text that is too long for any tokens: a tokenizer can take seconds for it.

        No token stands for more characters than the longest one of the vocabulary has.
        """
        if len(text) > self._most_chars:
            raise BadRequest(
                f"the prompt has {len(text)} characters, and {self._room_tokens} tokens, as many as a request may have "
                f"here, are {self._most_chars} characters at most: shorten it",
                where,
            )

    def _check_read(self, turns: list[ChatMessage], template: Template) -> None:
        """Refuse what the template does not read: it would change nothing."""
        unread = [
            f"messages[{index}].name" for index, turn in enumerate(turns) if turn.name and "name" not in self._names
        ]
        if not (template.add_generation_prompt or template.continue_final_message):
            unread += {"add_generation_prompt"} - self._variables
        unread += [f"chat_template_kwargs.{name[:40]}" for name in template.variables if name not in self._variables]
        for where in unread:
            raise BadRequest(f"the model's chat template does not read {where}; leave it out", where)
        for name in self._reserved & set(template.variables):
            where = f"chat_template_kwargs.{name}"
            raise BadRequest(f"{where} is no variable that a request may set; leave it out", where)


def _source_of_template(tokenizer: Any) -> str:
    """The chat template, of several the one that is used without tools; empty if there is none."""
    given = tokenizer.chat_template
    if isinstance(given, dict):
        given = given.get("default")
    return given if isinstance(given, str) else ""


def _names_in(template: str) -> frozenset[str]:
    """The variables, attributes and keys that a template names in its code, not in its text."""
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:
        return frozenset()
    return frozenset(value.strip("'\"") for _, kind, value in tokens if kind in ("name", "string"))


def _variables_in(template: str) -> frozenset[str]:
    """The variables that a template expects from outside; all its names, if it has tags of others than Jinja's."""
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:
        return _names_in(template)
    return frozenset(meta.find_undeclared_variables(parsed))

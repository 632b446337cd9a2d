"""Conversion of a checked call to engine requests: chat template, tokenizer, and the limit of the answer's length."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import jinja2
from jinja2 import meta

from kvroom import RequestTrace
from kvroom.engine.request import Request
from kvroom.status import BadRequest

from .bodies import ChatMessage
from .schema import Call, Template

_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
"""Exceptions of a chat template that gets messages or variables for which it was not written."""

_SHOWN_CHARS = 300


class Prompts:
    """A converter of calls to requests for one model.

    `tokenizer` is a transformers tokenizer. `room_tokens` limits prompt plus answer of one sequence, also if the
    client gave no limit. `eos_ids` are the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, room_tokens: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._room_tokens = room_tokens
        self._eos_ids = tuple(sorted(eos_ids))
        self._most_chars = room_tokens * max(map(len, tokenizer.get_vocab()))
        template = tokenizer.chat_template
        if isinstance(template, dict):  # of several templates, the one for requests without tools
            template = template.get("default")
        # `_names`: variables, attributes and keys in the template's code. `_variables`: those of them that the caller
        # has to supply, or all of them if the template uses tags that Jinja does not have.
        code = template if isinstance(template, str) else ""
        self._names = self._variables = frozenset[str]()
        with suppress(jinja2.TemplateSyntaxError):
            tokens = list(jinja2.Environment().lex(code))
            self._names = frozenset(value.strip("'\"") for _, kind, value in tokens if kind in ("name", "string"))
        try:
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(code)
            self._variables = frozenset(meta.find_undeclared_variables(parsed))
        except jinja2.TemplateSyntaxError:
            self._variables = self._names
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset(parameters) | {"messages"}

    def requests(self, call: Call, trace: RequestTrace) -> list[Request]:
        """Return one request per sequence. With a seed, sequence i of the call uses seed + i. Raises `BadRequest`."""
        encoded: list[tuple[int, ...]] = []
        for prompt in call.prompts[:: call.samples]:
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
                encoded.append(tuple(self._tokenizer.encode(prompt)))
            elif call.template is not None:
                turns = [turn for turn in prompt if isinstance(turn, ChatMessage)]
                encoded.append(self._encode_chat(turns, call.template))
            else:
                encoded.append(tuple(token for token in prompt if isinstance(token, int)))
        wanted = call.sampling
        requests = []
        for index, leg in enumerate(call.legs):
            prompt_ids = encoded[index // call.samples]
            left = max(1, self._room_tokens - len(prompt_ids))
            request = Request(
                request_id=trace.request_id,
                traceparent=trace.traceparent,
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
            requests.append(request)
        return requests

    def _encode_chat(self, turns: list[ChatMessage], template: Template) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", "messages")
        # Refuse options that the template does not read: they would silently have no effect.
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
            raise BadRequest(f"{where} is reserved and cannot be set by a request; leave it out", where)
        try:
            text = self._tokenizer.apply_chat_template(
                [turn.plain() for turn in turns],
                tokenize=False,
                add_generation_prompt=template.add_generation_prompt,
                continue_final_message=template.continue_final_message,
                **template.variables,
            )
        except _TEMPLATE_ERRORS as error:
            why = str(error)[:_SHOWN_CHARS]  # the exception may quote all messages
            raise BadRequest(f"the model's chat template refuses these messages: {why}", "messages") from error
        self._check_length(text, "messages")
        # The template already contains the special tokens.
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _check_length(self, text: str, where: str) -> None:
        """Refuse a text that cannot fit, before the tokenizer spends seconds on it.

        No token represents more characters than the longest one of the vocabulary has.
        """
        if len(text) > self._most_chars:
            raise BadRequest(
                f"the prompt has {len(text)} characters, but a request may have {self._room_tokens} tokens, which are "
                f"{self._most_chars} characters at most: shorten it",
                where,
            )

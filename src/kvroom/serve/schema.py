"""Conversion of the body of a generating route to one `Call`, or to one `BadRequest`.

`bodies` lists the allowed options. Any other option is refused, because ignoring an option would change the answer
without notice. Null means the default for any option: members that are null are removed before anything else is read.

Both workers of a pair parse the same body with the same code, so they accept or refuse it together. If only one of them
refuses it, because routers sent them different bodies or the workers differ, `named_legs` finds the rooms in which the
other worker may wait.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from kvroom import ROOM_NUMBERS
from kvroom.errors import ConfigurationError
from kvroom.network import HostPort
from kvroom.status import BadRequest

from .bodies import (
    MAX_SEQUENCES,
    Body,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerateBody,
    OpenAI,
    Routed,
    SamplingParams,
    StreamOptions,
)

Route = Literal["generate", "completions", "chat"]
"""The generating route that received a body."""

MAX_DEPTH = 32
"""Limit of nested objects and lists. No option needs more, and the code that walks through a body recurses."""
_NESTING = frozenset({dict, list})
_SHOWN_CHARS = 80
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_BODIES: Mapping[Route, type[Routed]] = {"generate": GenerateBody, "completions": CompletionBody, "chat": ChatBody}
_PROMPTS: Mapping[Route, tuple[str, ...]] = {
    "generate": ("text", "input_ids"),
    "completions": ("prompt",),
    "chat": (),
}

T = TypeVar("T")
BodyT = TypeVar("BodyT", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling and of the end of an answer. `max_tokens` None means as many as fit into the context.

    `logit_bias` are pairs of a token id and a number that is added to its logit, in the order of the ids.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int


@dataclass(frozen=True, kw_only=True)
class Template:
    """Options of the chat template. `variables` are additional variables for it."""

    add_generation_prompt: bool
    continue_final_message: bool
    variables: Mapping[str, Any]


Prompt = str | list[int] | list[ChatMessage]


class RoomEnd(NamedTuple):
    """A worker's end of a room. `address` is that of the prefill side's bootstrap directory, or "" if unknown."""

    room: int
    address: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request, with all checks that need no tokenizer.

    `prompts[i]` belongs to `legs[i]`. A prompt with `samples` choices occurs `samples` times in a row, because each
    choice is handed over in its own room. `template` is set for a chat only.
    """

    route: Route
    model: str
    prompts: tuple[Prompt, ...]
    legs: tuple[RoomEnd, ...]
    samples: int
    batched: bool
    sampling: Sampling
    stream: bool
    cache_salt: str
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    template: Template | None = None


def decode_json(raw: bytes) -> dict[str, Any]:
    """Return the body as a JSON object without null members. Raises `BadRequest` if it is no JSON object."""
    try:
        body = msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason}; send one JSON object in UTF-8") from error
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}; send one JSON object") from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply; send one flat JSON object") from error
    body = _without_nulls(body, MAX_DEPTH)
    if not isinstance(body, dict):
        raise BadRequest(f"the body is {_shown(body)}; send one JSON object")
    return body


def parse(route: Route, body: dict[str, Any]) -> Call:
    """Check a body that `decode_json` returned. Raises `BadRequest` with the field, its value and the remedy."""
    admitted = _admitted(body, _BODIES[route], "")
    if route == "generate":
        generate = _converted(admitted, GenerateBody)
        if (generate.text is None) == (generate.input_ids is None):
            raise BadRequest("give exactly one of `text` and `input_ids`", "text")
        given, name = (generate.text, "text") if generate.text is not None else (generate.input_ids, "input_ids")
        prompts, batched = _split_prompts(given, name)
        asked = generate.sampling_params or SamplingParams()
        sampling = Sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            logit_bias=_biases(asked.logit_bias, "sampling_params.logit_bias"),
            seed=asked.sampling_seed,
            stop=_stops(asked.stop),
            ignore_eos=asked.ignore_eos,
            max_tokens=asked.max_new_tokens,
            min_tokens=asked.min_new_tokens,
        )
        return _call(route, generate, prompts, asked.n, batched=batched, sampling=sampling)
    if route == "completions":
        completion = _converted(admitted, CompletionBody)
        prompts, batched = _split_prompts(completion.prompt, "prompt")
        return _parse_openai(route, completion, prompts, batched=batched, max_tokens=completion.max_tokens)
    chat = _converted(admitted, ChatBody)
    limit = chat.max_completion_tokens or chat.max_tokens
    if chat.continue_final_message and chat.add_generation_prompt:
        raise BadRequest(
            "continue_final_message=true and add_generation_prompt=true exclude each other: leave one out",
            "continue_final_message",
        )
    opens = not chat.continue_final_message if chat.add_generation_prompt is None else chat.add_generation_prompt
    template = Template(
        add_generation_prompt=opens,
        continue_final_message=chat.continue_final_message,
        variables=chat.chat_template_kwargs,
    )
    return _parse_openai(route, chat, [chat.messages], batched=False, max_tokens=limit, template=template)


def named_legs(route: Route, body: Mapping[str, Any]) -> tuple[RoomEnd, ...]:
    """Return the legs that a refused body names, as far as they can be read. Never raises."""
    prompts = 1
    for name in _PROMPTS[route]:
        given = body.get(name)
        if isinstance(given, list) and not any(isinstance(item, int) for item in given):
            prompts = len(given)
            break
    holder = body.get("sampling_params") if route == "generate" else body
    n = holder.get("n", 1) if isinstance(holder, dict) else 1
    n = n if type(n) is int else 0
    if not 1 <= n * prompts <= MAX_SEQUENCES:
        return ()
    try:
        rooms = _rooms(_converted(_only(body, "bootstrap_room"), Routed), prompts, n)
    except BadRequest:
        return ()
    try:
        addresses = _addresses(_converted(_only(body, "bootstrap_host", "bootstrap_port"), Routed), prompts, n)
    except BadRequest:
        addresses = ("",) * len(rooms)
    return tuple(map(RoomEnd, rooms, addresses))


def derived_room(room: int, index: int) -> int:
    """Return the room of choice `index` of a prompt with `room`: `room` for choice 0, otherwise a hash."""
    if index == 0:
        return room
    digest = hashlib.blake2b(room.to_bytes(8, "big") + index.to_bytes(8, "big"), digest_size=8, person=b"kvroom choice")
    return int.from_bytes(digest.digest(), "big") >> 1


# the three routes


def _parse_openai(
    route: Route,
    body: OpenAI,
    prompts: list[Prompt],
    *,
    batched: bool,
    max_tokens: int | None,
    template: Template | None = None,
) -> Call:
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is for streams only: send stream=true, or leave it out", "stream_options")
    sampling = Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        logit_bias=_biases(body.logit_bias, "logit_bias"),
        seed=body.seed,
        stop=_stops(body.stop),
        ignore_eos=body.ignore_eos,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
    )
    call = _call(route, body, prompts, body.n, batched=batched, sampling=sampling)
    said = body.stream_options or StreamOptions()
    return replace(
        call,
        include_usage=said.include_usage,
        continuous_usage=said.continuous_usage_stats,
        return_token_ids=body.return_token_ids,
        template=template,
    )


def _call(route: Route, body: Routed, prompts: list[Prompt], n: int, *, batched: bool, sampling: Sampling) -> Call:
    if len(prompts) * n > MAX_SEQUENCES:
        raise BadRequest(
            f"{len(prompts)} prompts with n={n} are {len(prompts) * n} sequences; send at most {MAX_SEQUENCES}", "n"
        )
    return Call(
        route=route,
        model=body.model,
        prompts=tuple(prompt for prompt in prompts for _ in range(n)),
        legs=tuple(map(RoomEnd, _rooms(body, len(prompts), n), _addresses(body, len(prompts), n))),
        samples=n,
        batched=batched or n > 1,
        sampling=sampling,
        stream=body.stream,
        cache_salt=body.cache_salt,
    )


def _biases(given: Mapping[str, float], name: str) -> tuple[tuple[int, float], ...]:
    for token_id in given:
        if not _TOKEN_ID.fullmatch(token_id):
            raise BadRequest(f"{name} has {_shown(token_id)} for a token id; give a number, as a string", name)
    return tuple(sorted((int(token_id), bias) for token_id, bias in given.items()))


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _split_prompts(given: Any, name: str) -> tuple[list[Prompt], bool]:
    """Return the prompts of a prompt or a list of prompts, and whether it was a list of them."""
    if isinstance(given, str):
        return [given], False
    if not given:
        raise BadRequest(f"{name} is empty; give at least one token", name)
    if all(isinstance(item, int) for item in given):
        return [given], False
    if any(isinstance(item, int) for item in given):
        raise BadRequest(f"{name} mixes token ids with whole prompts; give one or the other", name)
    return list(given), True


# rooms


def _rooms(body: Routed, prompts: int, n: int) -> tuple[int, ...]:
    """Return a room for each sequence, in the order of the sequences.

    Routers give a room to each sequence (smg: `n` choices of a chat), to each prompt (smg: completions), or one to the
    whole body (SGLang's mini_lb). With one room for several prompts, prompt i gets the room number plus i, as in SGLang
    (0.5.23, `GenerateReqInput._normalize_bootstrap_params`); after the last number follows 0. In SGLang all choices of
    a prompt share its room. Here choice k gets `derived_room(room, k)`, because a room serves one sequence.
    """
    given = body.bootstrap_room
    if isinstance(given, int):
        given = [(given + index) % ROOM_NUMBERS for index in range(prompts)]
    rooms: tuple[int, ...] = _one_each(given, prompts, n, "bootstrap_room")
    if given is not None and len(given) == prompts:
        rooms = tuple(derived_room(room, index % n) for index, room in enumerate(rooms))
    if len(set(rooms)) != len(rooms):
        raise BadRequest(
            f"bootstrap_room contains a room twice: {_shown(list(rooms))}; give each sequence its own", "bootstrap_room"
        )
    return rooms


def _addresses(body: Routed, prompts: int, n: int) -> tuple[str, ...]:
    """Return the address of the bootstrap directory for each sequence."""
    hosts = _one_each(body.bootstrap_host, prompts, n, "bootstrap_host")
    ports = _one_each(body.bootstrap_port, prompts, n, "bootstrap_port")
    try:
        return tuple(str(HostPort.to_dial(host, port)) for host, port in zip(hosts, ports, strict=True))
    except ConfigurationError as error:
        raise BadRequest(f"bootstrap_host: {error}", "bootstrap_host") from error


def _one_each(given: list[T] | T | None, prompts: int, n: int, name: str) -> tuple[T, ...]:
    """Return a router's field for `prompts * n` sequences, from one value for all, per prompt or per sequence."""
    if given is None:
        raise BadRequest(f"{name} is missing; send the request to the router, which chooses it", name)
    if not isinstance(given, list):
        return (given,) * (prompts * n)
    if len(given) == prompts * n:
        return tuple(given)
    if len(given) != prompts:
        raise BadRequest(
            f"{name} has {len(given)} value(s) for {prompts} prompt(s) with n={n}; give one for each prompt", name
        )
    return tuple(value for value in given for _ in range(n))


def _only(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: body[name] for name in names if name in body}


# the allow list


def _without_nulls(value: Any, depth: int) -> Any:
    """Return a JSON value without the null members of its objects."""
    if type(value) not in _NESTING:
        return value
    if depth == 0:
        raise BadRequest(f"the body is nested too deeply, beyond {MAX_DEPTH} levels; send one flat JSON object")
    if isinstance(value, list):
        if _NESTING.isdisjoint(map(type, value)):
            return value  # avoid a call for each of possibly 100,000 token ids
        return [_without_nulls(item, depth - 1) for item in value]
    return {name: _without_nulls(item, depth - 1) for name, item in value.items() if item is not None}


def _admitted(given: dict[str, Any], kind: type[Body], path: str) -> dict[str, Any]:
    """Return the fields of `kind`, including nested ones. Raises `BadRequest` for an option that is not allowed."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        where = f"{path}{name[:_SHOWN_CHARS]}"
        if name in kind.NEUTRAL:
            # In JSON 1 and 1.0 are the same number, and true is not a number.
            accepted = [one for one in kind.NEUTRAL[name] if isinstance(one, bool) == isinstance(value, bool)]
            if value not in accepted:
                raise BadRequest(f"{where}={_shown(value)} is not supported by this server; leave {where} out", where)
        elif name not in kind.__struct_fields__:
            raise BadRequest(f"{where}={_shown(value)} is not an option of this server; leave {where} out", where)
        elif name in kind.NESTED:
            fields[name] = _admitted_within(value, kind.NESTED[name], where)
        else:
            fields[name] = value
    return fields


def _admitted_within(value: Any, kind: type[Body], where: str) -> Any:
    if isinstance(value, dict):
        return _admitted(value, kind, f"{where}.")
    if isinstance(value, list):
        return [_admitted_within(item, kind, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


_PATH = re.compile(r" - at `(key in )?\$\.?(?P<path>.*)`$")


def _converted(body: dict[str, Any], kind: type[BodyT]) -> BodyT:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        path = found["path"] if found else ""
        what = text[: found.start()] if found else text
        missing = re.match(r"Object missing required field `(.+)`", what)
        if missing:
            where = f"{path}.{missing[1]}" if path else missing[1]
            raise BadRequest(f"{where} is missing; add it to the body", where) from error
        value: Any = body
        # The path has the form `a.b[2].c`, with `[...]` for an index that msgspec does not report.
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
            if name:
                value = value.get(name) if isinstance(value, dict) else value
            elif index != "..." and isinstance(value, list):
                value = value[int(index)]
        shown = _shown(value)
        raise BadRequest(f"{path}={shown} is not allowed: {what[:1].lower()}{what[1:]}", path) from error


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
